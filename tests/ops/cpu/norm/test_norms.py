"""Kernels of norms and of a softmax with a table."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from compiled_kernels import PLAIN_ACTIVATIONS, random
from hypothesis import given, settings
from hypothesis import strategies as st

from ops.cpu.norm.layer_norm import layer_norm
from ops.cpu.norm.norms import response_scales, rms_norm
from ops.cpu.norm.softmax import biased_softmax

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def _tolerance(dtype: torch.dtype) -> float:
    return 2**-8 if dtype == torch.bfloat16 else 1e-6


# ---- layer norm ----------------------------------------------------------------------------------
@settings(max_examples=100)
@given(
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    size=st.lists(st.integers(1, 19), min_size=1, max_size=3),
    dim=st.sampled_from([1, 2, 15, 16, 20, 40, 64, 65, 96, 300]),
    activation=st.sampled_from(list(PLAIN_ACTIVATIONS)),
    shift=st.sampled_from([0.0, 30.0]),
)
def test_is_the_norm(dtype, size, dim, activation, shift) -> None:
    x = (random(*size, dim) + shift).to(dtype)
    weight, bias = random(dim, seed=1), random(dim, seed=2)
    expected = F.layer_norm(x.double(), (dim,), weight, bias, 1e-3)
    expected = PLAIN_ACTIVATIONS[activation](expected)
    out = layer_norm(x, weight.float(), bias.float(), 1e-3, activation)
    assert out.dtype == dtype and out.is_contiguous()
    # Float32 keeps 24 bits of the shift, and a norm of few channels divides by their deviation.
    tolerance = (30 if dim < 15 else 1) * (_tolerance(dtype) + shift * 2e-6)
    assert (out - expected).abs().max() <= tolerance * (1 + expected.abs().max())


def test_nan_stays_within_its_pixel() -> None:
    x = random(4, 20).float()
    x[1, 3], x[2, 3] = float("nan"), float("inf")
    lost = layer_norm(x, torch.ones(20), torch.zeros(20), 1e-6, "gelu").isnan()
    assert lost[1:3].all() and not lost[[0, 3]].any()


# ---- others --------------------------------------------------------------------------------------
@DTYPES
@pytest.mark.parametrize("dim", [1, 2, 15, 16, 40, 65, 300])
def test_is_the_rms_norm(dtype: torch.dtype, dim: int) -> None:
    x, weight = random(3, 7, dim).to(dtype), random(dim, seed=1)
    expected = F.rms_norm(x.double(), (dim,), weight, 1e-3)
    out = rms_norm(x, weight.float(), 1e-3)
    assert out.dtype == dtype and out.is_contiguous()
    assert (out - expected).abs().max() <= _tolerance(dtype) * expected.abs().max()


@DTYPES
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (2, 3, 5, 17), (1, 20, 19, 200), (3, 16, 32, 129), (2, 30, 37, 21)]
)
def test_is_the_scale_of_a_response_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight = random(*shape).to(dtype), random(shape[3], seed=1)
    norm = x.double().flatten(1, 2).norm(dim=1)
    expected = 1 + weight * (norm / (norm.mean(1, keepdim=True) + 1e-3))
    out = response_scales(x, weight.float(), 1e-3)
    assert out.dtype == dtype and out.shape == expected.shape
    assert (out - expected).abs().max() <= _tolerance(dtype) * expected.abs().max()
    assert response_scales(torch.zeros_like(x), weight.float(), 1e-6).eq(1).all()


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("table", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [1, 7, 16, 25, 48, 169])
def test_is_the_softmax(length: int, table: torch.dtype, half: bool) -> None:
    x, bias = 9 * random(2, 3, 5, length).float(), random(3, 5, length, seed=1).to(table)
    out = biased_softmax(x, bias, half)
    assert out.dtype == (torch.bfloat16 if half else torch.float32) and out.is_contiguous()
    expected = (x.double() + bias.double()).softmax(-1)
    assert (out - expected).abs().max() <= (2**-9 if half else 1e-6)


def test_a_softmax_of_numbers_that_are_not_finite() -> None:
    inf = torch.inf
    rows = [[0, -inf, 1], [-inf, -inf, -inf], [0, inf, 1], [0, torch.nan, 1], [3e38, 3e38, 0]]
    for length in (3, 40):
        x = torch.full((5, length), -inf)
        x[:, :3] = torch.tensor(rows)
        out = biased_softmax(x[None], torch.zeros(5, length), False)[0]
        torch.testing.assert_close(out, x.softmax(-1), equal_nan=True)
