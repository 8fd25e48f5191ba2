"""Tiled inference, so that memory does not grow with the image.

As in the published code of HAT (https://arxiv.org/abs/2205.04437), tiles are processed with a
margin that is then cropped; optionally, adjacent tiles are blended at their seams.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ops.arguments import checked

__all__ = ["Tile", "run_tiled", "tile_spans", "tiled_strips"]


@dataclass(frozen=True)
class Tile:
    """A tile along one side in pixels: covers ``start … stop`` and reads ``first … last``."""

    start: int
    stop: int
    first: int
    last: int


@checked(least={"size": 0, "overlap": 0})
def tile_spans(size: int, tile_size: int, overlap: int) -> list[Tile]:
    """Divide a side into tiles; the last one may be smaller.

    Args:
        size: of the side.
        tile_size: of the tiles.
        overlap: margin that each tile reads beyond its ends, clipped to the image.
    """
    return [
        Tile(
            start,
            min(start + tile_size, size),
            max(start - overlap, 0),
            min(start + tile_size + overlap, size),
        )
        for start in range(0, size, tile_size)
    ]


@checked(ranks={"x": 4}, least={"overlap": 0, "blend": 0})
def run_tiled(
    network: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    tile_size: int,
    overlap: int,
    scale: int = 1,
    blend: int = 0,
) -> Tensor:
    """``network(x)``, computed tile by tile.

    The result differs from the untiled one if the receptive field exceeds ``overlap``. For networks
    that pad to a multiple of a window, ``tile_size`` and ``overlap`` should be multiples of it, so
    that the windows of tiles and whole image coincide.

    Args:
        network: maps (B, C, H, W) to (B, C', H·scale, W·scale).
        x: (B, C, H, W).
        tile_size: side of a tile, in pixels of ``x``.
        overlap: margin around a tile, in pixels of ``x``.
        scale: size of the output relative to the input.
        blend: pixels of ``x`` on both sides of a seam over which adjacent tiles are cross-faded
            linearly; 0 for hard seams, as published.

    Returns:
        (B, C', H·scale, W·scale).

    Raises:
        ValueError: invalid sizes, or a network with another ``scale``.
    """
    strips = tiled_strips(
        network, x, tile_size=tile_size, overlap=overlap, scale=scale, blend=blend
    )
    return torch.cat(list(strips), dim=2)


@checked(ranks={"x": 4}, least={"overlap": 0, "blend": 0})
def tiled_strips(
    network: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    tile_size: int,
    overlap: int,
    scale: int = 1,
    blend: int = 0,
) -> Iterator[Tensor]:
    """Yield the result of :func:`run_tiled` in strips from top to bottom.

    Only a row of tiles is in memory at a time.

    Args: as :func:`run_tiled`.

    Yields:
        (B, C', rows, W·scale).

    Raises:
        ValueError: as :func:`run_tiled`.
    """
    if not 0 <= blend <= min(overlap, tile_size // 2):
        raise ValueError(
            f"blend must be in 0 … {min(overlap, tile_size // 2)} (overlap, and half of "
            f"tile_size), got {blend}"
        )
    height, width = x.shape[2:]
    if not height or not width:
        raise ValueError(f"an image of {height}×{width} has no pixels")
    carried: Tensor | None = None  # rows that the next row of tiles has a share in
    for row in tile_spans(height, tile_size, overlap):
        strip: Tensor | None = None
        for column in tile_spans(width, tile_size, overlap):
            result = network(x[:, :, row.first : row.last, column.first : column.last])
            expected = ((row.last - row.first) * scale, (column.last - column.first) * scale)
            if tuple(result.shape[2:]) != expected:
                raise ValueError(
                    f"with scale {scale} a tile should become {expected[0]}×{expected[1]}, but "
                    f"the network made {result.shape[2]}×{result.shape[3]}"
                )
            top, bottom, down = _weights(row, height, scale, blend, result)
            left, right, across = _weights(column, width, scale, blend, result)
            if strip is None:
                strip = result.new_zeros(*result.shape[:2], bottom - top, width * scale)
                if carried is not None:
                    strip[:, :, : carried.shape[2]] = carried
            kept = result[
                :,
                :,
                top - row.first * scale : bottom - row.first * scale,
                left - column.first * scale : right - column.first * scale,
            ]
            strip[:, :, :, left:right] += kept * down[:, None] * across
        assert strip is not None
        finished = height * scale if row.stop == height else (row.stop - blend) * scale
        # A copy: a view would keep the whole strip alive.
        carried = strip[:, :, finished - top :].clone()
        yield strip[:, :, : finished - top]


def _weights(
    tile: Tile, size: int, scale: int, blend: int, like: Tensor
) -> tuple[int, int, Tensor]:
    """The output range of a tile and its weights there, which add up to 1 with the neighbours'."""
    begin, end = max(tile.start - blend, 0), min(tile.stop + blend, size)
    weights = torch.ones((end - begin) * scale, dtype=like.dtype, device=like.device)
    if blend:
        positions = torch.arange(begin * scale, end * scale, device=like.device)
        positions = (positions.to(like.dtype) + 0.5) / scale
        if tile.start > 0:
            weights = weights * ((positions - tile.start) / (2 * blend) + 0.5).clamp(0, 1)
        if tile.stop < size:
            weights = weights * ((tile.stop - positions) / (2 * blend) + 0.5).clamp(0, 1)
    return begin * scale, end * scale, weights
