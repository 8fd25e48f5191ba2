"""Gated linear attention on the CPU by a compiled kernel (:mod:`ops.cpu.scan.gated_scan`).

https://arxiv.org/abs/2312.06635. Differentiable and deterministic, whatever the number of threads;
float32 and bfloat16 tensors.
To save memory, the backward pass recomputes the states within a chunk from the one before it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ops.cpu.call.differentiable import differentiable
from ops.cpu.scan.gated_scan import gated_scan, gated_scan_backward
from ops.linear_attention.reference import Inputs

__all__ = ["attend", "unavailable"]


def unavailable(query: Tensor, key: Tensor) -> str | None:
    """``None`` if this kernel supports the call, else the reason; the first call may compile it."""
    return gated_scan.unavailable(query.device, query.dtype)


def attend(inputs: Inputs) -> Tensor:
    """Gated linear attention; shapes as in :mod:`ops.linear_attention`."""
    out: Tensor = _gated_scan(*inputs)
    return out


def _gradients(grad_out: Tensor, *call: Any) -> list[Tensor | None]:
    query, key, value, log_gate, log_gate_back, bonus, scale = call
    sequences = (query, key, value, log_gate, log_gate_back)
    grads = [*gated_scan_backward(grad_out, *sequences, bonus is not None, scale), None]
    if bonus is not None:
        query, key, value, grad = (t.float() for t in (query, key, value, grad_out))
        weight = (query * key * bonus).sum(-1, keepdim=True) * scale  # of each value
        own = (grad * value).sum(-1, keepdim=True) * scale
        grads[0] += own * bonus * key
        grads[1] += own * bonus * query
        grads[2] += weight * grad
        grads[5] = (own * query * key).sum((0, 1))
    return grads


_gated_scan = differentiable(gated_scan, _gradients)
