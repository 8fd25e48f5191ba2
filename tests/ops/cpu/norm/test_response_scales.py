"""The kernel of a response norm's scales against float64."""

from __future__ import annotations

import pytest
import torch
from compiled_kernels import compiled_for, random, using_threads

from ops.cpu.norm.response_scales import response_scales


def _expected(x, weight, eps):
    norm = x.double().flatten(1, 2).norm(dim=1)
    return 1 + weight * (norm / (norm.mean(1, keepdim=True) + eps))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 5, 17), (1, 20, 19, 200), (3, 16, 32, 129)])
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


@pytest.mark.parametrize("instructions", ["avx2", "portable"])
def test_other_instruction_sets(instructions, monkeypatch):
    compiled_for(instructions, monkeypatch)
    x, weight = random(2, 18, 15, 21), random(21, seed=1)
    out = response_scales(x.float(), weight.float(), 1e-6)
    torch.testing.assert_close(out.double(), _expected(x, weight, 1e-6), rtol=1e-6, atol=1e-6)


def test_threads_and_strides_change_nothing():
    x, weight = random(2, 30, 37, 27).float()[..., 3:], random(24, seed=1).float()
    outs = []
    for threads in (1, 3, 7):
        with using_threads(threads):
            outs.append(response_scales(x, weight, 1e-6))
    torch.testing.assert_close(outs[0].double(), _expected(x, weight, 1e-6), rtol=1e-6, atol=1e-6)
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])


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
