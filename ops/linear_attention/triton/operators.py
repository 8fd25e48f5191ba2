"""The Triton kernels of gated linear attention as torch operators, with gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ops.linear_attention.triton import launch

__all__ = ["gated_scan"]

_INPUTS = (
    "Tensor query, Tensor key, Tensor value, Tensor gate, Tensor? back, bool apart, float scale"
)


@torch.library.custom_op(
    "vision_backbones::triton_gated_scan", mutates_args=(), schema=f"({_INPUTS}) -> Tensor"
)
def gated_scan(*inputs: Any) -> Tensor:
    return launch.forward(*inputs)


@gated_scan.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *others: Any) -> Tensor:
    return value.new_empty(value.shape, dtype=torch.float32)


@torch.library.custom_op(
    "vision_backbones::triton_gated_scan_backward",
    mutates_args=(),
    schema=f"(Tensor grad_out, {_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _backward_op(grad_out: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    *grads, of_back = launch.backward(grad_out, *inputs)
    # Operators can't return None.
    return (*grads, grads[0].new_empty(0) if of_back is None else of_back)


@_backward_op.register_fake
def _(grad_out: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    shapes = [torch.Size([0]) if t is None else t.shape for t in inputs[:5]]
    return tuple(grad_out.new_empty(shape, dtype=torch.float32) for shape in shapes)


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


gated_scan.register_autograd(_backward, setup_context=_setup_context)
