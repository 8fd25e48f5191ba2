"""Window attention against its definition, token by token."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ops.attention.window import (
    OverlappingWindowAttention,
    WindowAttention,
    overlap_position_index,
    relative_position_index,
    shift_masks,
)

SIZES = st.tuples(st.integers(1, 3), st.integers(1, 3))


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def attend(query: Tensor, keys: Tensor, values: Tensor, added: Tensor) -> Tensor:
    """One query (heads, d), keys and values (M, heads, d), terms (heads, M) → (heads · d,)."""
    scores = torch.einsum("hd,mhd->hm", query, keys) / query.shape[1] ** 0.5 + added
    return torch.einsum("hm,mhd->hd", scores.softmax(1), values).flatten()


def end_of_map(place: int, size: int, shift: int) -> bool:
    """Whether a row or column of the rolled map came from the other end."""
    return place >= size - shift


def naive_windows(module: WindowAttention, x: Tensor) -> Tensor:
    size, shift, heads = module.window_size, module.shift_size, module.num_heads
    height, width = x.shape[1:3]
    qkv = module.qkv(x.roll((-shift, -shift), (1, 2))).unflatten(3, (3, heads, -1))
    table = module.relative_position_bias_table
    out = torch.empty_like(x)
    for b in range(x.shape[0]):
        for y in range(height):
            for z in range(width):
                top, left = y // size * size, z // size * size
                near = [(j, k) for j in range(top, top + size) for k in range(left, left + size)]
                rows = [(y - j + size - 1) * (2 * size - 1) + z - k + size - 1 for j, k in near]
                apart = [
                    -100.0
                    * (
                        end_of_map(y, height, shift) != end_of_map(j, height, shift)
                        or end_of_map(z, width, shift) != end_of_map(k, width, shift)
                    )
                    for j, k in near
                ]
                added = table[rows].T + torch.tensor(apart, dtype=x.dtype)
                keys = torch.stack([qkv[b, j, k, 1] for j, k in near])
                values = torch.stack([qkv[b, j, k, 2] for j, k in near])
                out[b, y, z] = attend(qkv[b, y, z, 0], keys, values, added)
    return module.proj(out).roll((shift, shift), (1, 2))


def naive_overlap(module: OverlappingWindowAttention, x: Tensor) -> Tensor:
    size, large, heads = module.window_size, module.overlap_size, module.num_heads
    margin, side = (large - size) // 2, size + large - 1
    height, width = x.shape[1:3]
    qkv = module.qkv(x).unflatten(3, (3, heads, -1))
    table = module.relative_position_bias_table
    out = torch.empty_like(x)
    for b in range(x.shape[0]):
        for y in range(height):
            for z in range(width):
                top, left = y // size * size - margin, z // size * size - margin
                near = [(j, k) for j in range(large) for k in range(large)]
                first = size - large + 1
                # Python's lists count negative places from the end, as the published model does.
                rows = [(j - y % size + first) * side + k - z % size + first for j, k in near]
                seen = []
                for j, k in near:
                    inside = 0 <= top + j < height and 0 <= left + k < width
                    seen.append(
                        qkv[b, top + j, left + k] if inside else torch.zeros_like(qkv[b, 0, 0])
                    )
                added = torch.stack([list(table)[row] for row in rows], dim=1)
                keys, values = torch.stack([s[1] for s in seen]), torch.stack([s[2] for s in seen])
                out[b, y, z] = attend(qkv[b, y, z, 0], keys, values, added)
    return module.proj(out)


@given(
    grid=SIZES,
    size=st.integers(1, 3),
    shift=st.integers(0, 2),
    heads=st.sampled_from([1, 2]),
)
@settings(max_examples=20, deadline=None)
def test_windows(grid: tuple[int, int], size: int, shift: int, heads: int) -> None:
    torch.manual_seed(0)
    module = WindowAttention(4, size, heads, min(shift, size - 1)).double()
    torch.nn.init.normal_(module.relative_position_bias_table)
    x = random(2, grid[0] * size, grid[1] * size, 4)
    torch.testing.assert_close(module(x), naive_windows(module, x))


@pytest.mark.parametrize(("size", "ratio"), [(2, 1.0), (4, 0.5), (3, 0.0), (2, 2.0)])
def test_overlapping(size: int, ratio: float) -> None:
    torch.manual_seed(0)
    module = OverlappingWindowAttention(4, size, 2, ratio).double()
    torch.nn.init.normal_(module.relative_position_bias_table)
    x = random(1, 2 * size, size, 4)
    torch.testing.assert_close(module(x), naive_overlap(module, x))


def test_tables_may_be_given() -> None:
    x = random(1, 8, 8, 4)
    module = WindowAttention(4, 4, 2, 2).double()
    given = module(x, relative_position_index(4), shift_masks(4, 2, x.dtype))
    assert torch.equal(given, module(x))
    overlap = OverlappingWindowAttention(4, 4, 2).double()
    assert torch.equal(overlap(x, overlap_position_index(4, 6)), overlap(x))
