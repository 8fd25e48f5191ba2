"""Mixtures of each pixel with its neighbours on the CPU for inference (``shift.h``)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ops.cpu.call.binding import kernel
from ops.cpu.call.c_arguments import Call, sizes_of
from ops.cpu.call.dispatch import require_dtype
from ops.cpu.threads import VALUES, threads_for

__all__ = ["shifted_mixtures"]

_MOST = 3


@kernel("wkv", "wkv_shifted_mixtures", large_results=True)
def shifted_mixtures(x: Tensor, shares: Tensor, groups: int = 1) -> Call:
    """``x * share + shifted * (1 - share)`` for each row of ``shares``. No gradients.

    In each run of channels of ``shifted``, one quarter each comes from the left, right, upper and
    lower neighbour; zeros beyond the border.

    Args:
        x: (B, H, W, C), float32 or bfloat16.
        shares: (1 … 3, C) float32.
        groups: runs of channels; 4 · groups divides C.

    Returns:
        (rows, B, H, W, C), contiguous.
    """
    if x.ndim != 4 or shares.ndim != 2 or shares.shape[1] != x.shape[3]:
        raise ValueError(
            f"x must be (B, H, W, C) and shares (n, C), got {tuple(x.shape)} and "
            f"{tuple(shares.shape)}"
        )
    if not 1 <= len(shares) <= _MOST:
        raise ValueError(f"shares must have 1 … {_MOST} rows, got {len(shares)}")
    if groups < 1 or x.shape[3] % (4 * groups):
        raise ValueError(f"4 · groups must divide {x.shape[3]} channels, got groups {groups}")
    require_dtype(torch.float32, shares=shares)

    def arguments() -> Any:
        threads = threads_for(x.numel(), VALUES)
        return {
            **sizes_of(x, "batch height width dim"),
            "mixtures": len(shares),
            "threads": threads,
        }

    return Call(x.new_empty(len(shares), *x.shape), arguments)
