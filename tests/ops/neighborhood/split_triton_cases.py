"""The Triton kernels of split neighborhood attention against brute force in float64.

pytest does not collect this file by its name, see ``triton_cases.py``. On a GPU, run all of it by::

    python -m pytest tests/ops/neighborhood/split_triton_cases.py -m "slow or not slow"
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from neighborhood_oracle import Case, Limits
from split_oracle import FUNCTIONS, assert_exact, make_inputs, our_av, our_qk, split_case
from triton_interpreter import quick_interpreter

from ops.neighborhood import split, split_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LIMITS = (
    Limits(grouped=False, value_dim_differs=False)
    if DEVICE == "cuda"
    else Limits(
        max_size={1: 40, 2: 9, 3: 4}, dims=(1, 3, 8, 17), grouped=False, value_dim_differs=False
    )
)

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:triton")


@pytest.fixture(scope="session", autouse=True)
def only_triton():
    with quick_interpreter(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(split, "_backend", lambda tensor: split_triton)
        yield


def check(case: Case, which: str, dtype: torch.dtype) -> None:
    assert split_triton.unavailable(make_inputs(case, dtype)["query"].to(DEVICE)) is None
    assert_exact(case, which, dtype, DEVICE)


# Dilated and causal axes, a bias, additional keys, strided tensors.
_WINDOWS = ((5, 6), (2, 4), (1, 1), (2, 1), (False, True))
RICH = Case(*_WINDOWS, heads=2, dim=7, extra=3, has_rpb=True, packed=True)
DEEP = Case((3, 4, 5), (2, 3, 2), (1, 1, 1), (1, 1, 2), (True, False, False), dim=3, has_rpb=True)
LONG = Case((40,), (7,), (1,), (3,), (False,), dim=17, has_rpb=True)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        *[(RICH, torch.float32), (RICH, torch.bfloat16)],
        *[(DEEP, torch.float32), (LONG, torch.float32)],
        pytest.param(RICH, torch.float16, marks=pytest.mark.slow),
        *(
            pytest.param(case, dtype, marks=pytest.mark.slow)
            for case in (DEEP, LONG)
            for dtype in (torch.bfloat16, torch.float16)
        ),
    ],
)
@pytest.mark.parametrize("which", FUNCTIONS)
def test_cases(which, case, dtype):
    check(case, which, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(60 if DEVICE == "cuda" else 12))
def test_random_cases(seed):
    case = split_case(seed, LIMITS)
    if DEVICE == "cpu":
        case = dataclasses.replace(case, batch=1)
    for which in FUNCTIONS:
        check(case, which, torch.float32)


def test_second_derivatives():
    def second(dtype, device):
        tensors = {
            name: tensor.to(device).requires_grad_()
            for name, tensor in make_inputs(RICH, dtype).items()
        }
        attn = our_qk(RICH, tensors).softmax(-1)
        out = our_av(RICH, {**tensors, "weights": attn * tensors["weights"]})
        inputs = list(tensors.values())
        grads = torch.autograd.grad(out.sin().sum(), inputs, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), inputs)

    got = second(torch.float32, DEVICE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(split, "_backend", lambda tensor: split.split_tiled)
        true = second(torch.float64, "cpu")
    for a, b in zip(got, true, strict=True):
        torch.testing.assert_close(a.double().cpu(), b, rtol=1e-4, atol=1e-4 * b.abs().max().item())
