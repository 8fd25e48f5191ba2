"""Bi-WKV on the CPU by a compiled kernel (:mod:`ops.cpu.wkv.bi_wkv`), deterministic.

https://arxiv.org/abs/2403.02308
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ops.cpu.call.binding import registered
from ops.cpu.call.dispatch import is_plain_call, needs_grad
from ops.cpu.wkv.bi_wkv import bi_wkv_backward, bi_wkv_forward

__all__ = ["attend", "supports"]


def supports(
    key: Tensor, value: Tensor, decay: Tensor, first: Tensor, segments: int | None
) -> str | None:
    """``None`` if this kernel supports the call, else the reason.

    The first call may compile the kernel, which takes a few seconds.
    """
    return bi_wkv_forward.unsupported(key.device, key.dtype)


def attend(
    key: Tensor, value: Tensor, decay: Tensor, first: Tensor, segments: int | None
) -> Tensor:
    """See :func:`ops.bi_wkv.bi_wkv`; all tensors are float32.

    Raises:
        RuntimeError: the kernel is unavailable (check with :func:`supports`).
    """
    inputs = (key, value, decay, first, segments or 0, None)
    if is_plain_call(inputs[:4]) and needs_grad(inputs[:4]):
        return _forward_autograd(*inputs)
    out: Tensor = bi_wkv_forward(*inputs)
    return out


class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            out: Tensor = bi_wkv_forward(*inputs)
        ctx.save_for_backward(*inputs[:4])
        ctx.segments = inputs[4]
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Any, ...]:
        grads = bi_wkv_backward(grad_out, *ctx.saved_tensors, ctx.segments)
        return (*grads[:2], grads[2].sum(0), grads[3].sum(0), None, None)


@torch.library.impl(registered, "bi_wkv_forward", "AutogradCPU")
def _forward_autograd(*inputs: Any) -> Any:
    *scan, gate = inputs
    if needs_grad((*scan[:4], gate)):
        out = _Differentiable.apply(*scan, None)
        return out if gate is None else out * gate.sigmoid()
    with torch._C._AutoDispatchBelowAutograd():
        return bi_wkv_forward(*inputs)
