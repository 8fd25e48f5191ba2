"""The inference form of FaViT's attention against the plain layer."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from ops.attention.factorized import FactorizedAttention
from ops.inference.factorized import FastLocalBranch
from ops.inference.forms import fast_form
from ops.inference.layers import convert
from ops.reparam import fuse_children


def _fast(layer: nn.Module) -> Any:
    fast = copy.deepcopy(layer).eval().requires_grad_(False)
    fuse_children(fast)
    for part in list(fast.modules()):
        form = fast_form(part)
        if form is not None:
            convert(part, form)
    return fast


@pytest.mark.parametrize(
    ("size", "sr_ratio"),
    [
        ((7, 7), 1),  # one window
        ((14, 11), 2),  # few windows, a row that the global branch does not see
        ((37, 65), 4),  # windows whose sequence is averaged before the linear layer
        ((3, 9), 4),  # a side below the ratio: the plain form
    ],
)
def test_is_the_layer(size: tuple[int, int], sr_ratio: int) -> None:
    torch.manual_seed(0)
    dilations = (1, sr_ratio) if sr_ratio > 1 else (1,)
    layer, other = (FactorizedAttention(64, 2, sr_ratio, dilations).eval() for _ in range(2))
    fast = _fast(layer)
    x = torch.randn(3, *size, 64)
    with torch.no_grad():
        expected = layer(x)
        bound = 1e-5 * expected.abs().max()
        assert (fast(x) - expected).abs().max() <= bound
        assert (fast(x) - expected).abs().max() <= bound
        exact = copy.deepcopy(layer).double()(x.double())
        half = copy.deepcopy(fast).bfloat16()(x.bfloat16()).double()
        assert (half - exact).abs().max() <= 0.03 * exact.abs().max()
        fast.load_state_dict(_fast(other).state_dict())
        expected = other(x)
        assert (fast(x) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_averages_of_few_windows_are_in_the_weights() -> None:
    """What is kept is one weight for each number of windows that is met and small."""
    fast = _fast(FactorizedAttention(64, 2, 2, (1, 2)).eval())
    first, second = fast.local_branches
    assert isinstance(first, FastLocalBranch)
    with torch.no_grad():
        for size in (7, 14, 28, 14, 77):
            fast(torch.randn(1, size, size, 64))
    assert sorted(first.derived(torch.zeros(1))) == [4, 16]
    assert 36 in second.derived(torch.zeros(1))
