"""Reflection padding of any width, for networks that need multiples of a window."""

from __future__ import annotations

import torch
from torch import Tensor

from ops.arguments import checked
from ops.sizes import larger

__all__ = ["reflect_pad_to_multiple", "reflected_positions"]


@checked()
def reflected_positions(positions: Tensor, size: int) -> Tensor:
    """Reflect positions at both edges into 0 … size - 1, repeatedly, without repeating an edge.

    Args:
        positions: integers of any shape.
        size: length of the side, at least 1; if 1, all positions become 0.
    """
    # A tensor, since the size may be symbolic.
    period = torch.full_like(positions[:1], larger(2 * (size - 1), 1))
    positions = positions.remainder(period)
    return torch.minimum(positions, period - positions)


@checked(ranks={"x": 4})
def reflect_pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """Reflect the last rows and columns until both sides are multiples of ``multiple``.

    Equals ``F.pad(mode="reflect")`` where that is supported; beyond the side's length, which
    ``F.pad`` rejects, the reflection is repeated.

    Args:
        x: (B, C, H, W).

    Returns:
        (B, C, ⌈H / multiple⌉ · multiple, ⌈W / multiple⌉ · multiple); ``x`` itself if it fits.
    """
    for axis in (2, 3):
        size = x.shape[axis]
        if size % multiple:
            # In this form, a compiler can infer that a symbolic size is divisible by the multiple.
            padded = (size + multiple - 1) // multiple * multiple
            positions = torch.arange(padded, device=x.device)
            x = x.index_select(axis, reflected_positions(positions, size))
    return x
