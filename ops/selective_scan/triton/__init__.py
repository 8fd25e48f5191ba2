"""The selective scan as Triton kernels, forward and backward; deterministic.

https://arxiv.org/abs/2312.00752. Each program scans the sequence for a block of an image's
channels, whose states stay in registers. The kernels support NVIDIA GPUs with compute capability
8.0 or newer, and any device in Triton's interpreter, which is how they are tested without a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ops.triton_devices import device_problem

__all__ = ["scan", "unavailable"]

_MOST_STATES = 256


def unavailable(u: Tensor, A: Tensor) -> str | None:
    """``None`` if the kernels support the call, else the reason."""
    if u.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"the kernels compute in float32, float16 or bfloat16, got {u.dtype}"
    if A.shape[1] > _MOST_STATES:
        return f"the kernels support up to {_MOST_STATES} states per channel, got {A.shape[1]}"
    return device_problem(u)


def scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> Tensor:
    """See :func:`ops.selective_scan.selective_scan`."""
    absent = u.new_zeros(len(A), dtype=torch.float32)
    own, bias = (absent if t is None else t.float() for t in (D, delta_bias))
    out: Tensor = _forward(u, delta, A.float(), B, C, own, bias, delta_softplus)
    return out


@torch.library.custom_op("vision_backbones::triton_selective_scan", mutates_args=())
def _forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    delta_bias: Tensor,
    softplus: bool,
) -> Tensor:
    # Imported on first use, since triton is optional.
    from ops.selective_scan.triton import kernels

    return kernels.forward(u, delta, A, B, C, D, delta_bias, softplus)


@_forward.register_fake
def _(u: Tensor, *others: Any) -> Tensor:
    return u.new_empty(u.shape)


@torch.library.custom_op("vision_backbones::triton_selective_scan_backward", mutates_args=())
def _backward(
    grad_out: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    delta_bias: Tensor,
    softplus: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    from ops.selective_scan.triton import kernels

    return kernels.backward(grad_out, u, delta, A, B, C, D, delta_bias, softplus)


@_backward.register_fake
def _(grad_out: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    return tuple(grad_out.new_empty(t.shape, dtype=torch.float32) for t in inputs[:7])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:7])
    ctx.softplus = inputs[7]


def _differentiate(ctx: Any, grad_out: Tensor) -> tuple[Any, ...]:
    tensors = ctx.saved_tensors
    grads = _backward(grad_out, *tensors, ctx.softplus)
    return (*(g.to(t.dtype) for g, t in zip(grads, tensors, strict=True)), None)


_forward.register_autograd(_differentiate, setup_context=_setup_context)
