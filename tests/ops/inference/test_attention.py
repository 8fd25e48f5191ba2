"""Inference forms of attention layers against the plain layers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ops.attention.hilo import HiLoAttention
from ops.attention.rank_augmented import RankAugmentedAttention
from ops.inference import attention
from ops.inference.attention import FastHiLoAttention, FastRankAugmentedAttention
from ops.inference.conv import FastDepthwiseConv2d
from ops.inference.layers import FastLinear, convert


def _fast(layer: nn.Module, form: type[nn.Module]) -> Any:
    fast = copy.deepcopy(layer).eval().requires_grad_(False)
    for part in fast.modules():
        if type(part) is nn.Linear:
            convert(part, FastLinear)
        elif type(part) is nn.Conv2d:
            convert(part, FastDepthwiseConv2d)
    return convert(fast, form)


def _error(out: Tensor, expected: Tensor) -> float:
    return float((out - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("size", [(14, 14), (6, 9), (1, 1)])
@pytest.mark.parametrize(
    ("window_size", "alpha"), [(2, 0.5), (2, 0.9), (3, 0.0), (2, 1.0), (1, 0.5)]
)
def test_hilo(window_size: int, alpha: float, size: tuple[int, int]) -> None:
    """Padded or not, with both kinds of heads or one; weights that are loaded later count."""
    torch.manual_seed(0)
    layer, other = (HiLoAttention(48, 6, window_size, alpha).eval() for _ in range(2))
    fast = _fast(layer, FastHiLoAttention)
    x = torch.randn(3, *size, 48)
    with torch.no_grad():
        assert _error(fast(x), layer(x)) <= 1e-5
        assert _error(fast(x), layer(x)) <= 1e-5
        fast.load_state_dict(other.state_dict())
        assert _error(fast(x), other(x)) <= 1e-5
        exact = copy.deepcopy(other).double()(x.double())
        half = copy.deepcopy(fast).bfloat16()(x.bfloat16())
        assert _error(half.double(), exact) <= 0.02
        assert _error(copy.deepcopy(fast).double()(x.double()), exact) <= 1e-6


@pytest.mark.parametrize("images", [1, 2, 5])
def test_rank_augmented_by_images(images: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some images at a time, whatever their number, give what the batch gives."""
    torch.manual_seed(0)
    layer = RankAugmentedAttention(64, 2).eval()
    fast = _fast(layer, FastRankAugmentedAttention)
    x = torch.randn(5, 6, 7, 64)
    monkeypatch.setattr(attention, "_PROJECTED_BYTES", images * 4 * x[0].numel() * x.itemsize)
    with torch.no_grad():
        assert _error(fast(x), layer(x)) <= 1e-5
        assert _error(fast(x), layer(x)) <= 1e-5
        assert fast(x[:0]).shape == x[:0].shape


@pytest.mark.parametrize("linear", [True, False])
@pytest.mark.parametrize("size", [(5, 4), (17, 16)])
@pytest.mark.parametrize("dim", [64, 24])
def test_rank_augmented(dim: int, size: tuple[int, int], linear: bool) -> None:
    """Heads that the kernels take and heads that they refuse, few tokens and many."""
    torch.manual_seed(0)
    layer = RankAugmentedAttention(dim, 2, linear=linear).eval()
    fast = _fast(layer, FastRankAugmentedAttention)
    x = torch.randn(2, *size, dim)
    with torch.no_grad():
        exact = copy.deepcopy(layer).double()(x.double())
        assert _error(fast(x), exact) <= 1e-5
        half = copy.deepcopy(fast).bfloat16()(x.bfloat16())
        assert _error(half.double(), exact) <= 0.02
