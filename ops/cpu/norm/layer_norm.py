"""Layer norm on the CPU for inference, with an activation behind it (``norm.h``).

The kernel norms some pixels together; torch's waits for the sums of each one.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ops.cpu.activations import ACTIVATIONS
from ops.cpu.binding import Addresses, Call, kernel
from ops.cpu.dispatch import require_dtype
from ops.cpu.structures import structure
from ops.cpu.threads import VALUES, threads_for

__all__ = ["layer_norm"]

_Problem = structure("norm/norm.h", "norm::Problem")
_Tensors = structure("norm/norm.h", "norm::Tensors")


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
        (..., dim), contiguous, in the dtype of ``x``; sums are of float32.

    Raises:
        ValueError: shapes or dtypes that do not go together, or an unknown activation.
        RuntimeError: the kernel is not available here (its ``unsupported`` tells beforehand).
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {ACTIVATIONS}, got {activation!r}")
    if not weight.shape == bias.shape == x.shape[-1:]:
        raise ValueError(
            "x must be (..., dim), weight and bias (dim,), got "
            f"{tuple(x.shape)}, {tuple(weight.shape)} and {tuple(bias.shape)}"
        )
    require_dtype(torch.float32, weight=weight, bias=bias)
    out = x.new_empty(x.shape)

    def arguments() -> Any:
        half, pixels = x.dtype == torch.bfloat16, x.numel() // x.shape[-1]
        problem = _problem(pixels, x.shape[-1], activation, half, eps, torch.get_num_threads())
        tensors = {"in": x.contiguous(), "weight": weight, "bias": bias, "out": out}
        return problem, Addresses(_Tensors, tensors)

    return Call(out, arguments)


@functools.lru_cache(maxsize=1024)  # a network has few different ones, and filling them in is slow
def _problem(
    pixels: int, dim: int, activation: str, bfloat16: bool, eps: float, threads: int
) -> Any:
    return _Problem(
        pixels=pixels,
        dim=dim,
        activation=ACTIVATIONS.index(activation),
        bfloat16=bfloat16,
        eps=eps,
        threads=threads_for(pixels * dim, VALUES, threads),
    )
