"""Mixtures of each pixel with its neighbours on the CPU for inference (``shift.h``)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ops.cpu.binding import kernel
from ops.cpu.call import Addresses, Call, problem_of
from ops.cpu.dispatch import require_dtype
from ops.cpu.structures import structure
from ops.cpu.threads import VALUES, threads_for

__all__ = ["shifted_mixtures"]

_PROBLEM = structure("wkv/shift.h", "shift::Problem")
_TENSORS = structure("wkv/shift.h", "shift::Tensors")
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

    Raises:
        ValueError: mismatched shapes or dtypes.
        RuntimeError: the kernel is not available here (check its ``unsupported`` first).
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
    mixtures = x.new_empty(len(shares), *x.shape)

    def arguments() -> Any:
        problem = problem_of(
            _PROBLEM,
            x,
            "batch height width dim",
            groups=groups,
            mixtures=len(shares),
            threads=threads_for(x.numel(), VALUES),
        )
        tensors = {"in": x.contiguous(), "shares": shares.contiguous(), "out": mixtures}
        return problem, Addresses(_TENSORS, tensors)

    return Call(mixtures, arguments)
