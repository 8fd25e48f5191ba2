"""SHViT beyond the contract: distillation and its initial weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from zoo import images, randomise, small

import backbones
from backbones.cli.parity import checkpoint, image, reference, summary_error
from ops.replay.replay import Replay


@pytest.mark.parametrize("variant", ["shvit_s1", pytest.param("shvit_s4", marks=pytest.mark.slow)])
@torch.no_grad()
def test_distilled(variant):
    figures = reference("shvit", variant)
    distillation = figures["distillation"]
    rows = figures["state_dict"] + distillation["state_dict_extra"]
    model = backbones.create_model(variant, distilled=True).eval()
    backbones.load_checkpoint(model, checkpoint(figures, rows))
    x = image(distillation["input"], distillation["seed"])
    assert summary_error(model(x), distillation["logits"]) < 1e-5
    pair = model.train()(torch.cat((x, x)))
    assert [logits.shape for logits in pair] == [(2, 1000), (2, 1000)]
    assert len(model.get_classifier()) == 2
    model.reset_classifier(3)
    assert model.eval()(x).shape == (1, 3)
    assert model.fuse()(x).isfinite().all()


def test_residual_branches_start_at_zero():
    model = backbones.create_model("shvit_s1")
    block = model.stages[1].blocks[0]
    for norm in (block.conv.fn.norm, block.mixer.fn.proj.norm, block.ffn.fn.fc2.norm):
        assert not norm.weight.any()
    downsample = model.stages[1].downsample
    assert downsample[0].fn.norm.weight.min() == downsample[3].fn.norm.weight.min() == 1
    assert isinstance(block.mixer.fn.norm, nn.GroupNorm)
    assert 0.018 < model.head.fc.linear.weight.std() < 0.022


@torch.no_grad()
def test_maps_that_are_too_large_for_one_pass_are_replayed_too():
    plain = randomise(small("shvit")).eval()
    x = images(1, 3, 272, 288)  # 17×18 tokens
    expected = plain(x)
    model = plain.fuse()
    outs = [model(x) for _ in range(4)]
    assert [type(program) for program in model._records._programs.values()] == [Replay]
    assert all(torch.equal(out, outs[0]) for out in outs)
    torch.testing.assert_close(outs[0], expected, rtol=1e-4, atol=1e-5)
