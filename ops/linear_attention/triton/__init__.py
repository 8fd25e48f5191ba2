"""Gated linear attention as Triton kernels, with gradients.

https://arxiv.org/abs/2312.06635. The kernels run on NVIDIA GPUs from compute capability 8.0 on, and
on any device in Triton's interpreter (``TRITON_INTERPRET=1`` when triton is first imported), which
is how they are tested. States and sums are of float32; repeated calls give equal bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ops.neighborhood.triton import device_problem

__all__ = ["attend", "supports"]

_MAX_DIM = 256


def supports(query: Tensor, key: Tensor, value: Tensor, *others: Tensor | None) -> str | None:
    """None if the kernels can do this call, else the reason in words."""
    if query.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"the kernels compute in float32, float16 or bfloat16, got {query.dtype}"
    if query.shape[-1] > _MAX_DIM:
        return f"heads of keys have up to {_MAX_DIM} channels, got {query.shape[-1]}"
    return device_problem(query)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_gate: Tensor,
    log_gate_back: Tensor | None,
    bonus: Tensor | None,
    scale: float,
) -> Tensor:
    """Gated linear attention; shapes as in :mod:`ops.linear_attention`."""
    back = None if log_gate_back is None else log_gate_back.float()
    apart = bonus is not None
    out = _scan_op(query, key, value, log_gate.float(), back, apart, float(scale))
    if bonus is not None:
        weight = (query.float() * bonus.float() * key).sum(-1, keepdim=True)
        out = out + scale * weight * value
    return out.to(query.dtype)


_INPUTS = (
    "Tensor query, Tensor key, Tensor value, Tensor gate, Tensor? back, bool apart, float scale"
)


@torch.library.custom_op(
    "vision_backbones::triton_gated_scan", mutates_args=(), schema=f"({_INPUTS}) -> Tensor"
)
def _scan_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: Tensor,
    back: Tensor | None,
    apart: bool,
    scale: float,
) -> Tensor:
    # Imported on first use, because triton need not be installed.
    from ops.linear_attention.triton import launch

    return launch.forward(query, key, value, gate, back, apart, scale)


@_scan_op.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *others: Any) -> Tensor:
    return value.new_empty(value.shape, dtype=torch.float32)


@torch.library.custom_op(
    "vision_backbones::triton_gated_scan_backward",
    mutates_args=(),
    schema=f"(Tensor grad_out, {_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _backward_op(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: Tensor,
    back: Tensor | None,
    apart: bool,
    scale: float,
) -> tuple[Tensor, ...]:
    from ops.linear_attention.triton import launch

    *grads, of_back = launch.backward(grad_out, query, key, value, gate, back, apart, scale)
    # An operator returns tensors always.
    return (*grads, query.new_empty(0, dtype=torch.float32) if of_back is None else of_back)


@_backward_op.register_fake
def _(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: Tensor,
    back: Tensor | None,
    apart: bool,
    scale: float,
) -> tuple[Tensor, ...]:
    shapes = [t.shape for t in (query, key, value, gate)]
    shapes.append(torch.Size([0]) if back is None else back.shape)
    return tuple(query.new_empty(shape, dtype=torch.float32) for shape in shapes)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.params = inputs[5:]


def _backward(ctx: Any, grad_out: Tensor) -> tuple[Any, ...]:
    tensors = ctx.saved_tensors
    grads = _backward_op(grad_out, *tensors, *ctx.params)
    wanted = (
        grad.to(tensor.dtype) if need else None
        for grad, tensor, need in zip(grads, tensors, ctx.needs_input_grad[:5], strict=True)
    )
    return (*wanted, None, None)


_scan_op.register_autograd(_backward, setup_context=_setup_context)
