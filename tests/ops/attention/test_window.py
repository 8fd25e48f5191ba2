"""Window attention against its definition, token by token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ops.attention.window import (
    OverlappingWindowAttention,
    WindowAttention,
    overlap_position_index,
    overlapping_windows,
    relative_position_index,
    shift_masks,
    window_attention,
    window_merge,
    window_partition,
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


@given(grid=SIZES, size=st.integers(1, 4))
@settings(max_examples=20, deadline=None)
def test_partition_and_merge(grid: tuple[int, int], size: int) -> None:
    x = random(2, grid[0] * size, grid[1] * size, 3)
    windows = window_partition(x, size)
    assert windows.shape == (2, *grid, size**2, 3)
    last = x[:, -size:, -size:].flatten(1, 2)
    assert torch.equal(windows[:, -1, -1], last)
    assert torch.equal(window_merge(windows, size), x)


def test_overlapping_windows() -> None:
    x = random(1, 4, 6, 2)
    windows = overlapping_windows(x, 2, 4)
    assert windows.shape == (1, 2, 3, 16, 2)
    padded = F.pad(x, (0, 0, 1, 1, 1, 1))
    assert torch.equal(windows[0, 1, 2], padded[0, 2:6, 4:8].flatten(0, 1))
    assert torch.equal(overlapping_windows(x, 2, 2), window_partition(x, 2))


def test_position_indices() -> None:
    index = relative_position_index(3)
    assert index.shape == (9, 9)
    assert index[0, 0] == index[4, 4] == 12  # in the middle of 5×5
    assert index[0, 8] == 0 and index[8, 0] == 24
    assert index[0, 1] == 11 and index[0, 3] == 7
    wide = overlap_position_index(16, 24)
    assert wide.shape == (256, 576)
    assert wide.min() == 0 and wide.max() == 39**2 - 1
    assert wide[255, 0] == 39**2 - 880 and wide[0, 575] == 640


def test_masks() -> None:
    right, below, corner = shift_masks(4, 1)
    assert set(corner.unique().tolist()) == {-100.0, 0.0}
    assert right[0, 3] == right[3, 0] == -100 and right[0, 12] == 0
    assert below[0, 12] == below[12, 0] == -100 and below[0, 3] == 0
    assert torch.equal(corner, torch.minimum(right, below))
    assert not shift_masks(4, 0).any()


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


@pytest.mark.parametrize("kind", ["plain", "shifted", "overlapping"])
def test_gradients(kind: str) -> None:
    torch.manual_seed(0)
    module: torch.nn.Module = {
        "plain": WindowAttention(4, 2, 2),
        "shifted": WindowAttention(4, 2, 2, 1),
        "overlapping": OverlappingWindowAttention(4, 2, 2, 1.0),
    }[kind]
    gradients: list[list[Any]] = []
    for dtype in (torch.float32, torch.float64):
        module.to(dtype).zero_grad()
        x = random(1, 4, 6, 4).to(dtype).requires_grad_()
        module(x).square().sum().backward()
        gradients.append([x.grad, *(p.grad for p in module.parameters())])
    for single, double in zip(*gradients, strict=True):
        torch.testing.assert_close(single.double(), double, rtol=1e-4, atol=1e-5)
    assert torch.autograd.gradcheck(module, (random(1, 4, 4, 4).requires_grad_(),))


class Largest(TorchDispatchMode):
    """The most elements that any operation returned."""

    numel = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else (out,):
            if isinstance(value, Tensor):
                self.numel = max(self.numel, value.numel())
        return out


@torch.no_grad()
def test_scores_are_never_materialised() -> None:
    """Only the one term per kind of window is as large as a window's scores."""
    size, heads, windows = 8, 4, 64
    x = random(1, 64, 64, 8).float()
    for module in (WindowAttention(8, size, heads, 4), OverlappingWindowAttention(8, size, heads)):
        with Largest() as largest:
            module.eval()(x)
        assert largest.numel < windows * heads * size**4


def test_a_bias_for_all_windows_is_enough() -> None:
    """Masks of zeros change nothing, for any number of rows and columns of windows."""
    for rows, columns in ((1, 1), (1, 3), (3, 1), (2, 2)):
        query, key, value = (random(2, rows, columns, 4, 2, 3, seed=seed) for seed in range(3))
        bias = random(2, 4, 4, seed=3)
        expected = window_attention(query, key, value, bias)
        assert expected.shape == (2, rows, columns, 4, 6)
        masked = window_attention(query, key, value, bias, torch.zeros(3, 4, 4).double())
        torch.testing.assert_close(masked, expected)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="num_heads must divide dim 6, got 4"):
        WindowAttention(6, 4, 4)
    with pytest.raises(ValueError, match=r"shift_size must be in 0 … 3 \(below window_size\)"):
        WindowAttention(4, 4, 2, 4)
    with pytest.raises(ValueError, match=r"overlap_ratio 0\.25 grows windows of 4 to 5"):
        OverlappingWindowAttention(4, 4, 2, 0.25)
    with pytest.raises(ValueError, match="6×8 can't be divided into windows of 4"):
        WindowAttention(4, 4, 2)(torch.randn(1, 6, 8, 4))
