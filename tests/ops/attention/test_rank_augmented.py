"""Rank-augmented linear attention against the paper's formula, one head at a time."""

from __future__ import annotations

import pytest
import torch
from comparisons import assert_same_with_gradients
from compiled_kernels import random
from torch import Tensor

from ops.attention.rank_augmented import (
    rank_augmented_linear_attention,
    rotary_table,
)


def rotated(x: Tensor, width: int) -> Tensor:
    """Of one head on a map of ``width``, (N, d): pairs of channels as complex numbers, turned."""
    quarter, tokens = x.shape[1] // 4, torch.arange(len(x), dtype=x.dtype)
    frequency = 10000 ** -(torch.arange(quarter, dtype=x.dtype) / max(1, quarter - 1))
    angles = [place[:, None] * frequency for place in (tokens // width, tokens % width)]
    turn = torch.polar(torch.ones(()).to(x.dtype), torch.cat(angles, 1))
    return torch.view_as_real(torch.view_as_complex(x.unflatten(1, (-1, 2))) * turn).flatten(1)


def published(query: Tensor, key: Tensor, value: Tensor, width: int) -> Tensor:
    """The formula with its factors of N, for tokens (N, d) of one head on a map of ``width``."""
    count, dim = query.shape
    q = torch.where(query > 0, query + 1, query.exp())
    k = torch.where(key > 0, key + 1, key.exp())
    weights = ((q.mean(0) * dim**-0.5) @ k.T).softmax(0)
    k = count * weights[:, None] * k
    state = (rotated(k, width) * count**-0.5).T @ (value * count**-0.5)
    return rotated(q, width) @ state / (q @ k.mean(0) + 1e-6)[:, None]


@pytest.mark.parametrize(("height", "width", "dim"), [(3, 4, 8), (5, 2, 12), (1, 1, 4)])
def test_is_the_published_formula_with_its_gradients(height: int, width: int, dim: int) -> None:
    maps = [random(2, 3, height * width, dim, seed=i).requires_grad_() for i in range(3)]
    table = rotary_table(height, width, dim, dtype=torch.float64)
    out = rank_augmented_linear_attention(*maps, table)
    heads = zip(*(t.flatten(0, 1) for t in maps), strict=True)
    expected = torch.stack([published(*head, width) for head in heads]).view(out.shape)
    assert_same_with_gradients(out, expected, maps)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_single(dtype: torch.dtype) -> None:
    """No sum overflows, though there are more tokens than float16 can count."""
    maps, table = random(3, 1, 1, 70000, 4).to(dtype), rotary_table(250, 280, 4)
    out = rank_augmented_linear_attention(*maps, table)
    assert out.dtype == dtype
    exact = rank_augmented_linear_attention(*maps.double(), [t.double() for t in table])
    torch.testing.assert_close(out, exact.to(dtype), rtol=2e-2, atol=1e-3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(rank_augmented_linear_attention(*maps, table), out)
