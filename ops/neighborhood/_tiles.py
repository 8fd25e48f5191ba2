"""Tiles of the tiled neighborhood attention backend; congruent tiles share a mask.

Neighborhood attention: https://arxiv.org/abs/2204.07143.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ops.neighborhood._geometry import axis_windows, cross_index, cross_mask

# Queries per tile along each axis, by the map's rank. Larger tiles share more keys, smaller ones
# mask fewer.
_TILE_SIZE = {1: (64,), 2: (8, 8), 3: (2, 4, 4)}
# Maximum number of elements of a step's temporary tensors, to fit into the caches.
_STEP = 1 << 20


@dataclass(frozen=True)
class Tiles:
    """Congruent tiles, which share a mask and a bias.

    Attributes:
        queries: (tiles, T) tokens of the map.
        keys: (tiles, U) tokens of the map, the union of the queries' windows.
        visible: (T, U) bool, whether a query attends to a key.
        offsets: (T, U) indices into the flattened relative position bias; arbitrary if not visible.
        columns: (T, K) indices into the tile's keys of those in a query's window, in order;
            arbitrary if not seen.
        seen: (T, K) bool, whether that key exists; false only in causal windows that are not full.
        all_visible: whether every query attends to every key of its tile, so no mask is needed.
    """

    queries: Tensor
    keys: Tensor
    visible: Tensor
    offsets: Tensor
    columns: Tensor
    seen: Tensor
    all_visible: bool = False

    def steps(self, elements: int) -> Iterator[Tiles]:
        """Split into parts with small temporary tensors, of ``elements`` for each tile."""
        tiles = max(1, _STEP // max(1, elements))
        for queries, keys in zip(self.queries.split(tiles), self.keys.split(tiles), strict=True):
            yield replace(self, queries=queries, keys=keys)


@functools.lru_cache(maxsize=32)
def tiles_of_map(
    size: tuple[int, ...],
    kernel_size: tuple[int, ...],
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
    is_causal: tuple[bool, ...],
    device: torch.device,
) -> tuple[Tiles, ...]:
    """All tiles of a map; every query is in exactly one."""
    tile_size = _TILE_SIZE[len(size)]
    along_axes = [
        _tiles_of_axis(n, k, s, d, causal, tile, device)
        for n, k, s, d, causal, tile in zip(
            size, kernel_size, stride, dilation, is_causal, tile_size, strict=True
        )
    ]
    return tuple(_cross(tiles, size, kernel_size) for tiles in itertools.product(*along_axes))


def _cross(
    along_axes: tuple[Tiles, ...], size: tuple[int, ...], kernel_size: tuple[int, ...]
) -> Tiles:
    """The map's tiles with the given layout along each axis."""
    first, *others = along_axes
    queries, keys, visible, offsets = first.queries, first.keys, first.visible, first.offsets
    columns, seen = first.columns, first.seen
    for tiles, n, k in zip(others, size[1:], kernel_size[1:], strict=True):
        queries = cross_index(queries, tiles.queries, n)
        keys = cross_index(keys, tiles.keys, n)
        columns = cross_index(columns, tiles.columns, tiles.keys.shape[1])
        seen = cross_mask(seen, tiles.seen)
        visible = cross_mask(visible, tiles.visible)
        offsets = cross_index(offsets, tiles.offsets, 2 * k - 1)
    return Tiles(queries, keys, visible, offsets, columns, seen, all_visible=bool(visible.all()))


def _tiles_of_axis(
    n: int,
    kernel_size: int,
    stride: int,
    dilation: int,
    is_causal: bool,
    tile_size: int,
    device: torch.device,
) -> list[Tiles]:
    """The tiles of one axis; no tile spans several dilation groups."""
    congruent: dict[tuple, list[tuple[int, int]]] = {}
    windows = axis_windows(n, kernel_size, stride, dilation, is_causal, "cpu")
    starts_and_lengths = torch.stack(windows, 1).tolist()
    for group in range(dilation):
        of_group = starts_and_lengths[group::dilation]
        step = _even_tile_size(len(of_group), tile_size, stride)
        for first in range(0, len(of_group), step):
            first_key = of_group[first][0]
            of_tile = of_group[first : first + step]
            layout = tuple((start - first_key, length) for start, length in of_tile)
            position = (first * dilation + group, first_key * dilation + group)
            congruent.setdefault((first_key - first, layout), []).append(position)
    return [
        _axis_tiles(positions, shift, layout, kernel_size, dilation, device)
        for (shift, layout), positions in congruent.items()
    ]


def _axis_tiles(
    positions: list[tuple[int, int]],
    shift: int,
    layout: tuple[tuple[int, int], ...],
    kernel_size: int,
    dilation: int,
    device: torch.device,
) -> Tiles:
    """Tiles from the positions of their first query and key, and their internal layout.

    ``shift`` is the place of the first key minus that of the first query, ``layout`` the window of
    every query relative to the first key.
    """
    first_query, first_key = torch.tensor(positions, device=device).T.unsqueeze(-1)
    start, length = torch.tensor(layout, device=device).T.unsqueeze(-1)
    query = torch.arange(len(layout), device=device)
    key = torch.arange(sum(layout[-1]), device=device)
    step = torch.arange(kernel_size, device=device)
    seen = step < length
    return Tiles(
        first_query + query * dilation,
        first_key + key * dilation,
        (key >= start) & (key < start + length),
        (shift + key - query[:, None] + kernel_size - 1).clamp(0, 2 * kernel_size - 2),
        torch.where(seen, start + step, 0),
        seen,
    )


def _even_tile_size(group_size: int, tile_size: int, stride: int) -> int:
    """A multiple of the stride near ``tile_size`` that divides the group into similar parts.

    Tiles are congruent only if they are multiples of the stride.
    """
    strides = -(-group_size // stride)
    strides_of_tile = max(1, round(tile_size / stride))
    pieces = max(1, round(strides / strides_of_tile))
    return -(-strides // pieces) * stride
