"""Bi-WKV on the CPU by a compiled kernel (:mod:`ops.cpu.wkv.wkv`), deterministic.

https://arxiv.org/abs/2403.02308
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ops.cpu.call.differentiable import differentiable
from ops.cpu.wkv.wkv import bi_wkv_backward, bi_wkv_forward

__all__ = ["attend", "unavailable"]


def unavailable(
    key: Tensor, value: Tensor, decay: Tensor, first: Tensor, segments: int | None
) -> str | None:
    """``None`` if this kernel supports the call, else the reason; the first call may compile it."""
    return bi_wkv_forward.unavailable(key.device, key.dtype)


def attend(
    key: Tensor, value: Tensor, decay: Tensor, first: Tensor, segments: int | None
) -> Tensor:
    """See :func:`ops.bi_wkv.bi_wkv`; all tensors are float32."""
    out: Tensor = _bi_wkv(key, value, decay, first, None, segments or 0)
    return out


def _gradients(grad_out: Tensor, *call: Any) -> list[Tensor | None]:
    key, value, decay, first, gate, segments = call
    of_gate = None
    if gate is not None:
        share = gate.sigmoid()
        scanned = bi_wkv_forward(key, value, decay, first, None, segments)
        of_gate = grad_out * scanned * share * (1 - share)
        grad_out = grad_out * share
    grads = bi_wkv_backward(grad_out, key, value, decay, first, segments)
    return [*grads[:2], *(g.sum(0) for g in grads[2:]), of_gate]


_bi_wkv = differentiable(bi_wkv_forward, _gradients)
