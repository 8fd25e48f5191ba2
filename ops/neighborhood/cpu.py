"""Neighborhood attention on the CPU by compiled kernels (:mod:`ops.cpu.neighborhood.attention`).

https://arxiv.org/abs/2204.07143. Exact, differentiable and deterministic; float32 and bfloat16
tensors. Memory beyond the tensors does not grow with the window. The functions of the split form
compute float16 in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ops.cpu.build import unavailable_reason
from ops.cpu.call.differentiable import differentiable
from ops.cpu.call.dispatch import is_plain_call, needs_grad
from ops.cpu.neighborhood.attention import (
    na_cpu_backward,
    na_cpu_forward,
    na_cpu_mix,
    na_cpu_scatter,
    na_cpu_scores,
)
from ops.neighborhood._geometry import Inputs, NAParams
from ops.neighborhood.split_tiled import Window

__all__ = ["attend", "mix", "scatter", "scores", "unavailable"]

_MAX_DIM = 512


def unavailable(inputs: Inputs, params: NAParams | None = None) -> str | None:
    """``None`` if this kernel supports the call, else the reason; the first call may compile it."""
    query, _, value, *_ = inputs
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


def attend(inputs: Inputs, params: NAParams) -> tuple[Tensor, Tensor]:
    """Neighborhood attention, differentiable in all tensors; shapes as in ``ops.neighborhood``.

    Results do not depend on the number of threads, ``torch.get_num_threads()``; small calls (below
    about 2 MFLOP) use one thread.
    """
    arguments = (*inputs, *params.of_operators)
    with_lse = params.return_lse or needs_grad(inputs) or not is_plain_call(inputs)
    out, lse = _attend(*arguments, True) if with_lse else na_cpu_forward(*arguments, False)
    return out, lse


def _gradients(
    grad_out: Tensor | None, grad_lse: Tensor | None, out: Tensor, lse: Tensor, *call: Any
) -> Sequence[Tensor]:
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    grads: Sequence[Tensor] = na_cpu_backward(grad_out, grad_lse, out, lse, *call[:-1])
    return grads


_attend = differentiable(na_cpu_forward, _gradients)


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
