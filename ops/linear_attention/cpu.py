"""Gated linear attention on the CPU by a compiled kernel (:mod:`ops.cpu.scan.gated_scan`).

https://arxiv.org/abs/2312.06635. Differentiable and deterministic; float32 and bfloat16 tensors.
To save memory, the backward pass recomputes the states within a chunk from the one before it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ops.cpu.call.binding import registered
from ops.cpu.call.dispatch import is_plain_call, needs_grad
from ops.cpu.scan.gated_scan import gated_scan, gated_scan_backward

__all__ = ["attend", "supports"]


def supports(query: Tensor, *tensors: Tensor | None) -> str | None:
    """``None`` if this kernel supports the call, else the reason.

    The first call may compile the kernel, which takes a few seconds.
    """
    return gated_scan.unsupported(query.device, query.dtype)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_gate: Tensor,
    log_gate_back: Tensor | None,
    bonus: Tensor | None,
    scale: float,
) -> Tensor:
    """Gated linear attention; shapes as in :mod:`ops.linear_attention`.

    Results do not depend on the number of threads, ``torch.get_num_threads()``.

    Raises:
        RuntimeError: the kernel is unavailable (check with :func:`supports`).
    """
    back = None if log_gate_back is None else log_gate_back.float()
    bonus = None if bonus is None else bonus.float()
    inputs = (query, key, value, log_gate.float(), back, bonus)
    plain = is_plain_call(inputs) and needs_grad(inputs)
    out: Tensor = (_with_gradients if plain else gated_scan)(*inputs, float(scale))
    return out


class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            out: Tensor = gated_scan(*inputs)
        ctx.save_for_backward(*inputs[:6])
        ctx.scale = inputs[6]
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Any, ...]:
        tensors = ctx.saved_tensors
        *inputs, bonus = tensors
        grads = list(gated_scan_backward(grad_out, *inputs, bonus is not None, ctx.scale))
        grads.append(None)
        if bonus is not None:
            query, key, value = (t.float() for t in inputs[:3])
            weight = (query * key * bonus).sum(-1, keepdim=True) * ctx.scale  # of each value
            own = (grad_out.float() * value).sum(-1, keepdim=True) * ctx.scale
            grads[0] += own * bonus * key
            grads[1] += own * bonus * query
            grads[2] += weight * grad_out.float()
            grads[5] = (own * query * key).sum((0, 1))
        needed = ctx.needs_input_grad[:6]
        wanted = (
            grad.to(tensor.dtype) if need else None
            for grad, tensor, need in zip(grads, tensors, needed, strict=True)
        )
        return (*wanted, None)


@torch.library.impl(registered, "gated_scan", "AutogradCPU")
def _with_gradients(*inputs: Any) -> Any:
    if needs_grad(inputs[:6]):
        return _Differentiable.apply(*inputs)
    with torch._C._AutoDispatchBelowAutograd():
        return gated_scan(*inputs)
