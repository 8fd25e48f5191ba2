"""Root-mean-square norm on the CPU for inference (``rms.h``)."""

from __future__ import annotations

import torch
from torch import Tensor

from ops.cpu.call.binding import kernel
from ops.cpu.call.c_arguments import Call
from ops.cpu.call.dispatch import require_dtype
from ops.cpu.threads import VALUES, threads_for

__all__ = ["rms_norm"]


@kernel("norm", "rms_norm_forward")
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Call:
    """``x / sqrt(mean(x²) + eps) * weight`` over the last axis. No gradients.

    Args:
        x: (..., dim), float32 or bfloat16.
        weight: (dim,) float32.
        eps: added to the mean of the squares.

    Returns:
        (..., dim), contiguous, in the dtype of ``x``; sums are in float32.
    """
    if weight.shape != x.shape[-1:]:
        raise ValueError(
            f"x must be (..., dim) and weight (dim,), got {tuple(x.shape)} and "
            f"{tuple(weight.shape)}"
        )
    require_dtype(torch.float32, weight=weight)

    def arguments() -> dict[str, int]:
        pixels, dim = x.shape[:-1].numel(), x.shape[-1]
        return {"pixels": pixels, "dim": dim, "threads": threads_for(x.numel(), VALUES)}

    return Call(x.new_empty(x.shape), arguments)
