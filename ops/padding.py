"""Padding by reflection beyond what a map holds, for networks that want multiples of a window."""

from __future__ import annotations

import torch
from torch import Tensor

from ops.arguments import checked
from ops.sizes import larger

__all__ = ["reflect_pad_to_multiple", "reflected_positions"]


@checked()
def reflected_positions(positions: Tensor, size: int) -> Tensor:
    """Fold positions into 0 … size - 1 at both edges, back and forth, without repeating an edge.

    Args:
        positions: integers of any shape.
        size: length of the side, at least 1; on one of length 1 everything is position 0.
    """
    # A tensor, since the size may be symbolic.
    period = torch.full_like(positions[:1], larger(2 * (size - 1), 1))
    positions = positions.remainder(period)
    return torch.minimum(positions, period - positions)


@checked(ranks={"x": 4})
def reflect_pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """Reflect the last rows and columns until both sides are multiples of ``multiple``.

    As ``F.pad(mode="reflect")`` where that works; it refuses to pad a side by its length or more,
    while here the reflection goes on back and forth.

    Args:
        x: (B, C, H, W).

    Returns:
        (B, C, ⌈H / multiple⌉ · multiple, ⌈W / multiple⌉ · multiple); ``x`` itself if it fits.
    """
    for axis in (2, 3):
        size = x.shape[axis]
        if size % multiple:
            # Written like this, a compiler sees that an open size divides by the multiple.
            padded = (size + multiple - 1) // multiple * multiple
            positions = torch.arange(padded, device=x.device)
            x = x.index_select(axis, reflected_positions(positions, size))
    return x
