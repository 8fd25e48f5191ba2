"""VAN beyond the contract: its dense form and its initial weights."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

import backbones
from backbones import van
from backbones.cli.parity import checkpoint, image, reference, summary_error
from ops.cpu.feed_forward.depthwise_mlp import PackedDepthwiseMlp


@torch.no_grad()
def test_dense_copy():
    figures = reference("van", "van_b0")
    model = backbones.create_model("van_b0", features_only=True, norm_eps=1e-5).eval()
    dense = {k: v for k, v in checkpoint(figures).items() if k not in figures["dense_missing"]}
    backbones.load_checkpoint(model, dense)
    for case in figures["cases"]:
        maps = model(image(case["input"], case["seed"]))
        for feature, expected in zip(maps, case["features"], strict=True):
            assert summary_error(feature, expected) < 1e-5


def test_initial_weights():
    torch.manual_seed(0)
    model = backbones.create_model("van_b1")
    block = model.stages[2].blocks[0]
    for conv in (block.mlp.fc1, block.mlp.dwconv, block.attn.lka.dw_dilated, model.stem.conv):
        fan_out = conv.out_channels * math.prod(conv.kernel_size) / conv.groups
        assert conv.weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=0.05)
        assert not conv.bias.any()
    assert 0.018 < model.head.fc.weight.std() < 0.022
    assert torch.equal(block.ls1.gamma, torch.full((320,), 0.01))
    assert all(
        torch.equal(m.weight, torch.ones_like(m.weight))
        for m in model.modules()
        if isinstance(m, nn.BatchNorm2d)
    )


@torch.no_grad()
def test_fused_feed_forwards_take_one_pass(monkeypatch):
    plain = backbones.create_model("van_b0").eval()
    fused = copy.deepcopy(plain).fuse()
    calls = []
    call = PackedDepthwiseMlp.__call__
    monkeypatch.setattr(
        PackedDepthwiseMlp, "__call__", lambda *a, **k: calls.append(a) or call(*a, **k)
    )
    x = torch.randn(2, 3, 64, 96)
    torch.testing.assert_close(fused(x), plain(x), rtol=1e-4, atol=1e-5)
    assert len(calls) == sum(len(stage.blocks) for stage in plain.stages)
    monkeypatch.setattr(PackedDepthwiseMlp, "pays", lambda self, x: False)
    torch.testing.assert_close(fused(x), plain(x), rtol=1e-4, atol=1e-5)
    assert len(calls) == sum(len(stage.blocks) for stage in plain.stages)


def test_dropout_twice_in_the_mlp():
    """Before and after the last convolution, whose input and output otherwise have no zeros."""
    mlp, seen = van.ConvMlp(16, 64, drop=0.5).train(), []
    mlp.fc2.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    torch.manual_seed(0)
    seen.append(mlp(torch.randn(1, 16, 16, 16)))
    for value in seen:
        assert 0.45 < (value == 0).float().mean() < 0.55
