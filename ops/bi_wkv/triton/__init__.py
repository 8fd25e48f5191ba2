"""Bi-WKV as Triton kernels, forward and backward; deterministic.

https://arxiv.org/abs/2403.02308. Each program scans the sequence for a block of an image's
channels, like the C++ kernel. Exponents are relative to the running maximum, to avoid overflow.
The kernels support NVIDIA GPUs with compute capability 8.0 or newer, and any device in Triton's
interpreter, which is how they are tested without a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ops.triton_devices import device_problem

__all__ = ["attend", "unavailable"]


def unavailable(
    key: Tensor, value: Tensor, decay: Tensor, first: Tensor, segments: int | None
) -> str | None:
    """``None`` if the kernels support the call, else the reason."""
    if key.dtype != torch.float32:
        return f"the kernels compute in float32, not {key.dtype}"
    return device_problem(key)


def attend(
    key: Tensor, value: Tensor, decay: Tensor, first: Tensor, segments: int | None
) -> Tensor:
    """See :func:`ops.bi_wkv.bi_wkv`; all tensors are float32."""
    out: Tensor = _forward(key, value, decay, first, segments or 0)
    return out


@torch.library.custom_op("vision_backbones::triton_bi_wkv", mutates_args=())
def _forward(key: Tensor, value: Tensor, decay: Tensor, first: Tensor, segments: int) -> Tensor:
    # Imported on first use, since triton is optional.
    from ops.bi_wkv.triton import kernels

    return kernels.forward(key, value, decay, first, segments)


@_forward.register_fake
def _(key: Tensor, value: Tensor, decay: Tensor, first: Tensor, segments: int) -> Tensor:
    return key.new_empty(key.shape)


@torch.library.custom_op("vision_backbones::triton_bi_wkv_backward", mutates_args=())
def _backward(
    grad_out: Tensor, key: Tensor, value: Tensor, decay: Tensor, first: Tensor, segments: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from ops.bi_wkv.triton import kernels

    return kernels.backward(grad_out, key, value, decay, first, segments)


@_backward.register_fake
def _(
    grad_out: Tensor, key: Tensor, value: Tensor, decay: Tensor, first: Tensor, segments: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    image = (key.shape[0], key.shape[2])
    sizes = (key.shape, key.shape, image, image)
    grad_key, grad_value, grad_decay, grad_first = map(key.new_empty, sizes)
    return grad_key, grad_value, grad_decay, grad_first


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.segments = inputs[4]


def _differentiate(ctx: Any, grad_out: Tensor) -> tuple[Any, ...]:
    grads = _backward(grad_out, *ctx.saved_tensors, ctx.segments)
    return (*grads[:2], grads[2].sum(0), grads[3].sum(0), None)


_forward.register_autograd(_differentiate, setup_context=_setup_context)
