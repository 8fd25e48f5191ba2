"""Root-mean-square norm on the CPU for inference (``rms.h``)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ops.cpu.binding import kernel
from ops.cpu.call import Addresses, Call, problem_of
from ops.cpu.dispatch import require_dtype
from ops.cpu.structures import structure
from ops.cpu.threads import VALUES, threads_for

__all__ = ["rms_norm"]

_PROBLEM = structure("norm/rms.h", "rms::Problem")
_TENSORS = structure("norm/rms.h", "rms::Tensors")


@kernel("norm", "rms_norm_forward")
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Call:
    """``x / sqrt(mean(x²) + eps) * weight`` over the last axis. No gradients.

    Args:
        x: (..., dim), float32 or bfloat16.
        weight: (dim,) float32.
        eps: added to the mean of the squares.

    Returns:
        (..., dim), contiguous, in the dtype of ``x``; sums are in float32.

    Raises:
        ValueError: mismatched shapes or dtypes.
        RuntimeError: the kernel is not available here (check its ``unsupported`` first).
    """
    if weight.shape != x.shape[-1:]:
        raise ValueError(
            f"x must be (..., dim) and weight (dim,), got {tuple(x.shape)} and "
            f"{tuple(weight.shape)}"
        )
    require_dtype(torch.float32, weight=weight)
    out = x.new_empty(x.shape)

    def arguments() -> Any:
        problem = problem_of(
            _PROBLEM,
            x,
            pixels=x.numel() // x.shape[-1],
            dim=x.shape[-1],
            eps=eps,
            threads=threads_for(x.numel(), VALUES),
        )
        return problem, Addresses(_TENSORS, {"in": x.contiguous(), "weight": weight, "out": out})

    return Call(out, arguments)
