"""Initial weights have the stated spread."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from ops.init import init_fan_out, init_linear, init_trunc_normal, trunc_normal


def test_spread() -> None:
    torch.manual_seed(0)
    for layer, fan_out in (
        (nn.Conv2d(64, 128, 3), 128 * 9),
        (nn.Conv2d(512, 512, 5, groups=512), 25),
        (nn.Conv2d(64, 128, (1, 7), groups=2, bias=False), 128 * 7 / 2),
    ):
        init_fan_out(layer)
        assert layer.weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=0.03)
        init_trunc_normal(layer)
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.03)
        assert layer.weight.abs().max() <= 2
        assert layer.bias is None or not layer.bias.any()
    for initialise in (init_fan_out, init_linear):
        linear = nn.Linear(300, 300)
        initialise(linear)
        assert linear.weight.std().item() == pytest.approx(0.02, rel=0.03)
        assert not linear.bias.any()
    conv = nn.Conv2d(3, 4, 3)
    before = conv.weight.clone()
    init_linear(conv)
    assert torch.equal(conv.weight, before)
    norm = nn.BatchNorm2d(3)
    init_fan_out(norm)
    assert torch.equal(norm.weight, torch.ones(3))


@pytest.mark.slow
def test_no_draw_falls_on_a_far_cut() -> None:
    torch.manual_seed(0)
    weights = torch.empty(50_000_000)
    trunc_normal(weights)
    assert weights.abs().max() <= 0.1
    assert weights.std().item() == pytest.approx(0.02, rel=1e-3)
