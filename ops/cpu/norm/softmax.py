"""Softmax of logits with a table added, on the CPU for inference (``softmax.h``)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ops.cpu.call.binding import kernel
from ops.cpu.call.c_arguments import Call
from ops.cpu.call.dispatch import require_dtype, require_values
from ops.cpu.threads import VALUES, threads_for


@kernel("norm", "biased_softmax_forward", large_results=True)
def biased_softmax(x: Tensor, bias: Tensor, half: bool) -> Call:
    """``(x + bias).softmax(-1)``. No gradients.

    Args:
        x: (B, ..., K) float32; copied unless its rows are dense and equally far apart.
        bias: (..., K), float32 or bfloat16, the shape of ``x`` without its first axis.
        half: whether the result is in bfloat16.

    Returns:
        (B, ..., K), contiguous.
    """
    require_values(x=x)
    if bias.shape != x.shape[1:]:
        raise ValueError(f"bias must be {tuple(x.shape[1:])}, got {tuple(bias.shape)}")
    require_dtype(torch.float32, x=x)
    half_bias = bias.dtype == torch.bfloat16
    if not half_bias:
        require_dtype(torch.float32, bias=bias)

    def arguments() -> dict[str, Any]:
        length = x.shape[-1]
        rows = x if _are_even(x) else x.contiguous()
        return {
            **{"rows": x.numel() // length, "length": length, "period": bias.numel() // length},
            **{"pitch": rows.stride(-2), "in": rows, "half_bias": half_bias, "half": half},
            "threads": threads_for(4 * x.numel(), VALUES),
        }

    return Call(x.new_empty(x.shape, dtype=torch.bfloat16 if half else x.dtype), arguments)


def _are_even(x: Tensor) -> bool:
    """Whether rows are dense and equally far apart."""
    outer = zip(x.shape[1:-1], x.stride()[1:-1], x.stride(), strict=False)
    return x.stride(-1) == 1 and all(above == n * step for n, step, above in outer)
