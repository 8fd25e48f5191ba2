"""Neighborhood attention on the CPU by compiled kernels (:mod:`ops.cpu.neighborhood.attention`).

https://arxiv.org/abs/2204.07143. Exact, differentiable and deterministic; float32 and bfloat16
tensors. Memory beyond the tensors does not grow with the window. The functions of the split form
compute float16 in float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ops.cpu.build import unavailable_reason
from ops.cpu.call.binding import registered
from ops.cpu.call.dispatch import is_plain_call, needs_grad
from ops.cpu.neighborhood.attention import (
    na_cpu_backward,
    na_cpu_forward,
    na_cpu_mix,
    na_cpu_output,
    na_cpu_scatter,
    na_cpu_scores,
)
from ops.neighborhood._geometry import NAParams
from ops.neighborhood.split_tiled import Window

__all__ = ["attend", "mix", "scatter", "scores", "unavailable"]

_MAX_DIM = 512


def unavailable(query: Tensor, key: Tensor, value: Tensor, *others: Any) -> str | None:
    """``None`` if this kernel supports the call, else the reason.

    The first call may compile the kernel, which takes a few seconds.
    """
    if query.device.type != "cpu":
        return f"the compiled kernel runs on the CPU, the tensors are on {query.device.type}"
    if query.dtype not in (torch.float32, torch.bfloat16):
        return f"the compiled kernel supports float32 and bfloat16, not {query.dtype}"
    for dim in (query.shape[-1], value.shape[-1]):
        if dim > _MAX_DIM:
            return f"the compiled kernel supports head dims up to {_MAX_DIM}, not {dim}"
    return _unavailable_reason()


@torch.compiler.assume_constant_result
def _unavailable_reason() -> str | None:
    return unavailable_reason("neighborhood")


def attend(*call: Any) -> tuple[Tensor, Tensor | None]:
    """Neighborhood attention, differentiable in all tensors; shapes as in ``ops.neighborhood``.

    Results do not depend on the number of threads, ``torch.get_num_threads()``; small calls (below
    about 2 MFLOP) use one thread.

    Raises:
        RuntimeError: the kernel is unavailable (check with :func:`unavailable`).
    """
    params: NAParams
    *tensors, params = call
    inputs = (*tensors, *params.of_operators)
    if not is_plain_call(tensors):
        return na_cpu_forward(*inputs)
    if params.return_lse or needs_grad(tensors):
        return _forward_autograd(*inputs)
    return na_cpu_output(*inputs), None


class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            out, lse = na_cpu_forward(*inputs)
        ctx.save_for_backward(*inputs[:6], out, lse)
        ctx.geometry = inputs[6:]
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
        *inputs, out, lse = ctx.saved_tensors
        if grad_out is None:
            if grad_lse is None:
                return (None,) * 11
            grad_out = torch.zeros_like(out)
        grads = na_cpu_backward(grad_out, grad_lse, out, lse, *inputs, *ctx.geometry)
        wanted = (
            grad.to(tensor.dtype) if tensor is not None and needed else None
            for grad, tensor, needed in zip(grads, inputs, ctx.needs_input_grad, strict=False)
        )
        return (*wanted, None, None, None, None, None)


@torch.library.impl(registered, "na_cpu_forward", "AutogradCPU")
def _forward_autograd(*inputs: Any) -> Any:
    if needs_grad(inputs[:6]):
        return _Differentiable.apply(*inputs)
    with torch._C._AutoDispatchBelowAutograd():
        return na_cpu_forward(*inputs)


def scores(query: Tensor, key: Tensor, rpb: Tensor | None, fill: float, window: Window) -> Tensor:
    """See :func:`ops.neighborhood.split_tiled.scores`."""
    out: Tensor = na_cpu_scores(_wide(query), _wide(key), rpb, fill, *window)
    return out.to(query.dtype)


def mix(weights: Tensor, value: Tensor, window: Window) -> Tensor:
    """See :func:`ops.neighborhood.split_tiled.mix`."""
    out: Tensor = na_cpu_mix(_wide(weights), _wide(value), *window)
    return out.to(value.dtype)


def scatter(weights: Tensor, query: Tensor, window: Window) -> Tensor:
    """See :func:`ops.neighborhood.split_tiled.scatter`."""
    out: Tensor = na_cpu_scatter(_wide(weights), _wide(query), *window)
    return out.to(query.dtype)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype == torch.float16 else tensor
