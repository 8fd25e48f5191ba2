"""VAN beyond the contract: its dense form, fused feed-forwards, dropout."""

from __future__ import annotations

import torch

import backbones
from backbones import van


@torch.inference_mode()
def test_fused_feed_forwards_take_one_pass():
    model = backbones.create_model("van_b0").eval()
    blocks = sum(len(stage.blocks) for stage in model.stages)
    calls = backbones.explain(model.fuse(), 96, repeats=1).calls
    assert sum(call.kernel == "depthwise_mlp" for call in calls) == blocks


def test_dropout_twice_in_the_mlp():
    """Before and after the last convolution, whose input and output otherwise have no zeros."""
    mlp, seen = van.ConvMlp(16, 64, drop=0.5).train(), []
    mlp.fc2.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    torch.manual_seed(0)
    seen.append(mlp(torch.randn(1, 16, 16, 16)))
    for value in seen:
        assert 0.45 < (value == 0).float().mean() < 0.55
