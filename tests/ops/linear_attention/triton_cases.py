"""The Triton kernels of gated linear attention against the scan in float64.

pytest does not collect this file by its name: ``test_triton.py`` runs it in a process of its own,
where Triton interprets unless there is a GPU.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from scan_inputs import difference, inputs
from triton_interpreter import quick_interpreter

from ops.linear_attention import gated_linear_attention
from ops.linear_attention.triton.operators import gated_scan

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# Triton 3.7 imports a module that Python 3.12 and later warn about.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:triton")


@pytest.fixture(scope="session", autouse=True)
def quickly():
    with quick_interpreter():
        yield


def both(given, dtype):
    """Outputs and gradients by the kernels, and exact ones, by name."""
    results = []
    for backend, kind, device in (("triton", dtype, DEVICE), ("reference", torch.float64, "cpu")):
        tensors = {
            n: t.to(device, kind).requires_grad_() for n, t in given.items() if t is not None
        }
        out = gated_linear_attention(**tensors, backend=backend)
        share = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape)
        loss = (out * share.to(device, kind)).sum()
        gradients = torch.autograd.grad(
            loss, list(tensors.values()), materialize_grads=True, allow_unused=True
        )
        named = dict(zip(tensors, gradients, strict=True), out=out.detach())
        results.append({name: t.cpu() for name, t in named.items()})
    return results


@pytest.mark.parametrize(("back", "bonus"), list(itertools.product((False, True), (False, True))))
def test_output_and_gradients(back, bonus):
    given = inputs(18, 5, 20, back=back, bonus=bonus, batch=1, heads=1)
    got, expected = both(given, torch.float32)
    for name, exact in expected.items():
        assert difference(got[name], exact) < 3e-6, name


@pytest.mark.parametrize(("dim", "value_dim"), [(16, 32), (130, 17)])
def test_blocks_of_values(dim, value_dim):
    given = inputs(5, dim, value_dim, batch=2, heads=1, extremes=(-torch.inf, 0.0))
    got, expected = both(given, torch.float32)
    for name, exact in expected.items():
        assert difference(got[name], exact) < 3e-6, name


def test_half_precision_and_strides():
    given = inputs(6, 8, 16, batch=1, heads=2, dtype=torch.float32)
    given = {n: t if t is None else t.bfloat16().float() for n, t in given.items()}
    moved = {n: t if t is None else t.mT.contiguous().mT for n, t in given.items()}
    got, expected = both(moved, torch.bfloat16)
    for name, exact in expected.items():
        assert difference(got[name], exact) < 2**-7, name


def test_opcheck():
    given = inputs(4, 4, 4, batch=1, heads=1, dtype=torch.float32)
    tensors = [t.to(DEVICE).requires_grad_() for t in list(given.values())[:5]]
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(gated_scan, (*tensors, False, 0.5), test_utils=tests)
