"""The kernel of the softmax with a table against float64."""

from __future__ import annotations

import pytest
import torch
from compiled_kernels import random

from ops.cpu.norm.biased_softmax import biased_softmax

INF = float("inf")


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("table", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [1, 7, 16, 25, 48, 169])
def test_is_the_softmax(length, table, half):
    x, bias = 9 * random(2, 3, 5, length).float(), random(3, 5, length, seed=1).to(table)
    out = biased_softmax(x, bias, half)
    assert out.dtype == (torch.bfloat16 if half else torch.float32) and out.is_contiguous()
    expected = (x.double() + bias.double()).softmax(-1)
    assert (out - expected).abs().max() <= (2**-9 if half else 1e-6)


def test_numbers_that_are_not_finite():
    rows = [[0, -INF, 1], [-INF, -INF, -INF], [0, INF, 1], [0, float("nan"), 1], [3e38, 3e38, 0]]
    for length in (3, 40):
        x = torch.full((5, length), -INF)
        x[:, :3] = torch.tensor(rows)
        out = biased_softmax(x[None], torch.zeros(5, length), False)[0]
        torch.testing.assert_close(out, x.softmax(-1), equal_nan=True)


@pytest.mark.parametrize(
    ("x", "bias", "message"),
    [
        (torch.ones(2, 3, 4), torch.ones(3, 5), r"got \(2, 3, 4\) and \(3, 5\)"),
        (torch.ones(2, 0, 4), torch.ones(0, 4), r"must be \(B, ..., K\)"),
        (torch.ones(2, 3).double(), torch.ones(3), "x must be torch.float32"),
        (torch.ones(2, 3), torch.ones(3).double(), "bias must be torch.float32"),
    ],
)
def test_bad_arguments_are_refused(x, bias, message):
    with pytest.raises(ValueError, match=message):
        biased_softmax(x, bias, False)
