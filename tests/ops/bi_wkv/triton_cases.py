"""The Triton kernels of bi-WKV against the closed form in float64.

pytest does not collect this file by its name. Without a GPU, Triton must be told to interpret the
kernels before anything imports it, so ``test_triton.py`` runs this file in a process of its own. On
a GPU, run it by itself.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from triton_interpreter import quick_interpreter

from ops.bi_wkv import bi_wkv

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

pytestmark = pytest.mark.filterwarnings(
    # Triton 3.7 imports a module that Python 3.12 and later warn about.
    "ignore::DeprecationWarning:triton"
)


@pytest.fixture(scope="session", autouse=True)
def quickly():
    with quick_interpreter():
        yield


def check(tensors: list[Tensor], segments: int | None, bound: float) -> None:
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


def tensors(tokens: int, dim: int, scale: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    key, value = torch.randn(2, 2, tokens, dim, generator=generator)
    decay = torch.linspace(-5, 3, dim) / tokens
    return [key * scale, value, decay, torch.randn(dim, generator=generator) / tokens]


SIZES = [pytest.param(*n, marks=pytest.mark.slow) for n in [(1, 3), (2, 35), (33, 11), (64, 8)]]


@pytest.mark.parametrize("segments", [None, 3, pytest.param(32, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("tokens", "dim"), [(5, 3), *SIZES])
def test_outputs_and_gradients(tokens: int, dim: int, segments: int | None) -> None:
    check(tensors(tokens, dim), segments, 3e-6)


@pytest.mark.slow
@pytest.mark.parametrize("step", [0.0, 20.0, -20.0])
def test_extreme_keys_and_decays(step: float) -> None:
    key, value, decay, first = tensors(9, 7, 80.0)
    check([key, value, torch.full_like(decay, step), 50 * first], None, 2e-4)


def test_a_decay_of_zero() -> None:
    key, value, decay, first = tensors(9, 7)
    check([key, value, decay * 0, first], 4, 3e-6)


@pytest.mark.parametrize("segments", [None, 3])
def test_masked_tokens(segments: int | None) -> None:
    key, value, decay, first = tensors(9, 3)
    key[0, [0, 1, 4, 8]] = -torch.inf
    check([key, value, decay, first], segments, 3e-6)
