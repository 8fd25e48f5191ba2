"""Layer norm on the CPU for inference, with a fused activation (``norm.h``).

The kernel interleaves several pixels; torch's stalls on the sums of each one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ops.arguments import require_shapes
from ops.cpu.activations import require_activation
from ops.cpu.call.binding import kernel
from ops.cpu.call.c_arguments import Call
from ops.cpu.call.dispatch import require_dtype
from ops.cpu.threads import VALUES, threads_for

__all__ = ["layer_norm"]


@kernel("norm", "norm_forward")
def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, activation: str = "none"
) -> Call:
    """``activation(norm(x) * weight + bias)`` over the last axis. No gradients.

    Args:
        x: (..., dim), float32 or bfloat16.
        weight, bias: (dim,) float32.
        eps: added to the variance.
        activation: one of :data:`ops.cpu.activations.ACTIVATIONS`; GELU is the exact one.

    Returns:
        (..., dim), contiguous, in the dtype of ``x``; sums are in float32.

    Raises:
        ValueError: mismatched shapes or dtypes, or an unknown activation.
    """
    require_activation(activation)
    require_shapes(x=(x, "... dim"), weight=(weight, "dim"), bias=(bias, "dim"))
    require_dtype(torch.float32, weight=weight, bias=bias)

    def arguments() -> dict[str, int]:
        pixels, dim = x.shape[:-1].numel(), x.shape[-1]
        return {"pixels": pixels, "dim": dim, "threads": threads_for(x.numel(), VALUES)}

    return Call(x.new_empty(x.shape), arguments)
