"""The kernel of a response norm's scales against float64."""

from __future__ import annotations

import pytest
import torch
from compiled_kernels import random

from ops.cpu.norm.response_scales import response_scales


def _expected(x, weight, eps):
    norm = x.double().flatten(1, 2).norm(dim=1)
    return 1 + weight * (norm / (norm.mean(1, keepdim=True) + eps))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (2, 3, 5, 17), (1, 20, 19, 200), (3, 16, 32, 129), (2, 30, 37, 21)]
)
def test_is_the_scale(shape, dtype):
    x, weight = random(*shape).to(dtype), random(shape[3], seed=1)
    out = response_scales(x, weight.float(), 1e-3)
    assert out.dtype == dtype and out.shape == (shape[0], shape[3])
    tolerance = 2**-8 if dtype == torch.bfloat16 else 1e-6
    expected = _expected(x, weight, 1e-3)
    assert (out - expected).abs().max() <= tolerance * expected.abs().max()


def test_of_a_map_of_zeros():
    assert torch.equal(
        response_scales(torch.zeros(1, 2, 2, 5), torch.ones(5), 1e-6), torch.ones(1, 5)
    )


@pytest.mark.parametrize(
    ("x", "weight", "message"),
    [
        ((2, 3, 4), (4,), r"must be \(B, H, W, dim\)"),
        ((2, 3, 4, 5), (4,), r"weight \(dim,\), got \(2, 3, 4, 5\) and \(4,\)"),
        ((2, 0, 4, 5), (5,), "with pixels"),
    ],
)
def test_bad_arguments_are_refused(x, weight, message):
    with pytest.raises(ValueError, match=message):
        response_scales(torch.ones(x), torch.ones(weight), 1e-6)
    with pytest.raises(ValueError, match=r"weight must be torch.float32, got torch.float64"):
        response_scales(torch.ones(1, 1, 1, 2), torch.ones(2).double(), 1e-6)
