"""RMS and global response norms on the CPU for inference (``norm.cpp``, ``response.h``).

https://arxiv.org/abs/1910.07467, https://arxiv.org/abs/2301.00808
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ops.arguments import require_shapes
from ops.cpu.call.binding import kernel
from ops.cpu.call.c_arguments import Call
from ops.cpu.call.dispatch import require_dtype, require_values
from ops.cpu.threads import VALUES, threads_for


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
    require_shapes(x=(x, "... dim"), weight=(weight, "dim"))
    require_dtype(torch.float32, weight=weight)

    def arguments() -> dict[str, int]:
        pixels, dim = x.shape[:-1].numel(), x.shape[-1]
        return {"pixels": pixels, "dim": dim, "threads": threads_for(x.numel(), VALUES)}

    return Call(x.new_empty(x.shape), arguments)


@kernel("norm", "response_scales_forward")
def response_scales(x: Tensor, weight: Tensor, eps: float) -> Call:
    """``1 + weight * n / (mean(n) + eps)`` for the norm n of each channel. No gradients.

    Args:
        x: (B, H, W, dim), float32 or bfloat16; copied unless it is contiguous.
        weight: (dim,) float32.
        eps: added to the mean of the channels' norms.

    Returns:
        (B, dim) in the dtype of ``x``; sums are in float32.
    """
    require_shapes(x=(x, "batch height width dim"), weight=(weight, "dim"))
    require_values(x=x)
    require_dtype(torch.float32, weight=weight)

    def arguments() -> dict[str, Any]:
        batch, height, width, dim = x.shape
        return {
            **{"batch": batch, "pixels": height * width, "dim": dim},
            "threads": threads_for(x.numel(), VALUES),
        }

    return Call(x.new_empty(x.shape[0], x.shape[3]), arguments)
