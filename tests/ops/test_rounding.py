"""Weights in fewer bits: each filter keeps its sum; nothing else changes."""

from __future__ import annotations

import pytest
import torch
from compiled_kernels import random
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import backbones
from ops.rounding import round_filters, round_keeping_sums

_DTYPES = [torch.bfloat16, torch.float16]


def _step(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The distance of neighbouring numbers of ``dtype`` at ``x``."""
    return 2.0 ** x.abs().clamp(min=2.0**-14).log2().floor() * torch.finfo(dtype).eps


@settings(max_examples=100, deadline=None)
@given(
    dtype=st.sampled_from(_DTYPES),
    filters=st.integers(1, 20),
    taps=st.integers(1, 49),
    seed=st.integers(0, 99),
)
def test_sums_stay(dtype: torch.dtype, filters: int, taps: int, seed: int) -> None:
    """Up to the rounding of the smallest tap; each tap moves by at most a step of the largest."""
    weight = random(filters, taps, seed=seed).float()
    rounded = round_keeping_sums(weight, dtype)
    assert rounded.dtype == dtype and rounded.shape == weight.shape
    error = rounded.double() - weight.double()
    step = _step(weight, dtype)
    assert (error.sum(-1).abs() <= step.amax(-1) * 0.51).all()
    assert (error.abs() <= 1.01 * step.amax(-1, keepdim=True)).all()
    if taps >= 9:
        plain = (weight.to(dtype).double() - weight.double()).sum(-1)
        assert error.sum(-1).square().mean() <= plain.square().mean() + 1e-12


@pytest.mark.parametrize("dtype", _DTYPES, ids=str)
def test_representable_numbers_stay(dtype: torch.dtype) -> None:
    weight = random(5, 9).to(dtype)
    assert torch.equal(round_keeping_sums(weight.float(), dtype), weight)


def test_infinities_and_nan_stay() -> None:
    weight = torch.tensor([[1.0, float("inf"), 0.3], [0.3, float("nan"), 1.0]])
    rounded = round_keeping_sums(weight, torch.bfloat16)
    assert rounded.isinf().tolist() == weight.isinf().tolist()
    assert rounded.isnan().tolist() == weight.isnan().tolist()


def test_only_filters_change() -> None:
    layers = [nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 5, groups=8), nn.Conv2d(8, 4, 1), nn.Linear(4, 2)]
    model = nn.Sequential(*layers).requires_grad_(False)
    before = [layer.weight.clone() for layer in layers]
    round_filters(model, torch.float32)
    assert all(torch.equal(a.weight, b) for a, b in zip(layers, before, strict=True))
    round_filters(model, torch.bfloat16)
    changed = [not torch.equal(a.weight, b) for a, b in zip(layers, before, strict=True)]
    assert changed == [True, True, False, False]
    assert all(layer.weight.dtype == torch.float32 for layer in layers)


@torch.inference_mode()
def test_a_constant_image_is_convolved_more_exactly() -> None:
    """As by the first layer of a fused model, whose folded norm subtracts most of its result."""
    torch.manual_seed(0)
    model = backbones.create_model("proxyless_mobile", num_classes=3).eval()
    folded = model.fuse(channels_last=False)
    stem = next(m for m in folded.modules() if isinstance(m, nn.Conv2d))
    image = torch.full((1, 3, 9, 9), 2.0)
    exact = nn.functional.conv2d(image, stem.weight)
    plain = nn.functional.conv2d(image, stem.weight.bfloat16().float())
    round_filters(folded, torch.bfloat16)
    kept = nn.functional.conv2d(image, stem.weight)
    assert (kept - exact).norm() < 0.3 * (plain - exact).norm()
