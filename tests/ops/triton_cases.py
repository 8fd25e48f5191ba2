"""The Triton kernels of the scans against the references in float64.

pytest does not collect this file by its name: ``test_scans.py`` runs it in a process of its own,
where Triton interprets unless there is a GPU. On a GPU, run it by itself.
"""

from __future__ import annotations

import pytest
import torch
from scan_inputs import difference, gradients_of, inputs, map_inputs, selective_inputs
from torch import Tensor
from triton_interpreter import quick_interpreter

from ops.bi_wkv import bi_wkv
from ops.linear_attention import gated_linear_attention
from ops.linear_attention.triton.kernels import gated_scan
from ops.selective_scan import cross_selective_scan, selective_scan
from ops.selective_scan.triton.kernels import scan

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# Triton 3.7 imports a module that Python 3.12 and later warn about.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:triton")
slow = pytest.mark.slow


@pytest.fixture(scope="session", autouse=True)
def quickly():
    with quick_interpreter():
        yield


def assert_close(function, given, tolerance=3e-6, dtype=torch.float32, **options):
    expected = gradients_of(function, given, torch.float64, **options, backend="reference")
    moved = {n: t.to(DEVICE) for n, t in given.items() if t is not None}
    found = gradients_of(function, moved, dtype, **options, backend="triton")
    for name, exact in expected.items():
        assert difference(found[name].cpu(), exact) < tolerance, name


def rounded(given: dict[str, Tensor]) -> dict[str, Tensor]:
    """In numbers of bfloat16, with other strides."""
    found = {n: t.bfloat16().double() for n, t in given.items() if t is not None}
    return {n: t.mT.contiguous().mT if t.ndim > 1 else t for n, t in found.items()}


# ---- bi-WKV ------------------------------------------------------------------------------------
def wkv_tensors(tokens: int, dim: int, scale: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    key, value = torch.randn(2, 2, tokens, dim, generator=generator)
    decay = torch.linspace(-5, 3, dim) / tokens
    return [key * scale, value, decay, torch.randn(dim, generator=generator) / tokens]


def check_wkv(tensors: list[Tensor], segments: int | None, bound: float) -> None:
    exact = [t.double().requires_grad_() for t in tensors]
    single = [t.float().to(DEVICE).requires_grad_() for t in tensors]
    expected = bi_wkv(*exact, segments, "reference")
    out = bi_wkv(*single, segments, "triton")
    assert (out.cpu() - expected).abs().max() <= bound
    weight = torch.linspace(-1, 1, out.numel()).reshape(out.shape)
    got = torch.autograd.grad(out, single, weight.to(DEVICE))
    want = torch.autograd.grad(expected, exact, weight.double(), materialize_grads=True)
    for a, b in zip(got, want, strict=True):
        assert a.isfinite().all()
        assert (a.cpu() - b).abs().max() <= 3 * bound * max(1, b.abs().max())


SIZES = [(5, 3), *(pytest.param(*n, marks=slow) for n in [(1, 3), (2, 35), (33, 11), (64, 8)])]


@pytest.mark.parametrize("segments", [None, 3, pytest.param(32, marks=slow)])
@pytest.mark.parametrize(("tokens", "dim"), SIZES)
def test_bi_wkv_gradients(tokens: int, dim: int, segments: int | None) -> None:
    check_wkv(wkv_tensors(tokens, dim), segments, 3e-6)


@slow
@pytest.mark.parametrize("step", [0.0, 20.0, -20.0])
def test_bi_wkv_gradients_of_extreme_keys_and_decays(step: float) -> None:
    key, value, decay, first = wkv_tensors(9, 7, 80.0)
    check_wkv([key, value, torch.full_like(decay, step), 50 * first], None, 2e-4)


@pytest.mark.parametrize("segments", [None, 3])
def test_bi_wkv_gradients_without_decay_and_with_masked_tokens(segments: int | None) -> None:
    key, value, decay, first = wkv_tensors(9, 3)
    key[0, [0, 1, 4, 8]] = -torch.inf
    check_wkv([key, value, decay, first], segments, 3e-6)
    check_wkv([key, value, decay * 0, first], segments, 3e-6)


# ---- gated linear attention --------------------------------------------------------------------
@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize("bonus", [False, True])
def test_linear_gradients(back, bonus):
    given = inputs(18, 5, 20, back=back, bonus=bonus, batch=1, heads=1)
    assert_close(gated_linear_attention, given)


@pytest.mark.parametrize(("dim", "value_dim"), [(16, 32), (130, 17)])
def test_linear_blocks_of_values(dim, value_dim):
    given = inputs(5, dim, value_dim, batch=2, heads=1, extremes=(-torch.inf, 0.0))
    assert_close(gated_linear_attention, given)


# ---- the selective scan ------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("channels", "states", "groups"), [(6, 1, 2), (5, 16, 1), (150, 3, 2), (2, 70, 1)]
)
def test_selective_gradients(channels, states, groups):
    given = selective_inputs(18, channels, states, groups)
    assert_close(selective_scan, given, delta_softplus=True)


def test_selective_extremes_and_absent_tensors():
    given = selective_inputs(40, 6, 3, extreme=True)
    assert_close(selective_scan, given, 1e-5, delta_softplus=True)
    given = {**selective_inputs(6), "D": None, "delta_bias": None}
    given["delta"] = given["delta"].exp()
    assert_close(selective_scan, given)


def test_a_map_in_four_orders():
    assert_close(cross_selective_scan, map_inputs(3, 4, states=2), delta_softplus=True)


# ---- both --------------------------------------------------------------------------------------
def test_half_precision_and_strides():
    given = rounded(inputs(6, 8, 16, batch=1, heads=2))
    assert_close(gated_linear_attention, given, 2**-7, torch.bfloat16)
    given = rounded(selective_inputs(6, states=3))
    assert_close(selective_scan, given, 2**-7, torch.bfloat16, delta_softplus=True)


def test_operators():
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    for operator, given, options in (
        (gated_scan, inputs(4, 4, 4, batch=1, heads=1, dtype=torch.float32), (False, 0.5)),
        (scan, selective_inputs(4, dtype=torch.float32), (True,)),
    ):
        tensors = [t.to(DEVICE).requires_grad_() for t in given.values() if t is not None]
        torch.library.opcheck(operator, (*tensors, *options), test_utils=tests)
