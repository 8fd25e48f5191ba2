"""Gated linear attention on the CPU by a compiled kernel (:mod:`ops.cpu.scan.gated_scan`).

https://arxiv.org/abs/2312.06635. Deterministic; float32 and bfloat16 tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ops.cpu.scan.gated_scan import gated_scan

__all__ = ["attend", "supports"]


def supports(query: Tensor, *tensors: Tensor | None) -> str | None:
    """``None`` if this kernel can do the call, else the reason in words.

    The first call on a machine compiles the kernel, which takes some seconds.
    """
    return _unsupported(query.device, query.dtype)


@torch.compiler.assume_constant_result
def _unsupported(device: torch.device, dtype: torch.dtype) -> str | None:
    return gated_scan.unsupported(device, dtype)


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

    Raises:
        RuntimeError: if the kernel cannot be built here (:func:`supports` tells beforehand).
    """
    back = None if log_gate_back is None else log_gate_back.float()
    bonus = None if bonus is None else bonus.float()
    out: Tensor = gated_scan(query, key, value, log_gate.float(), back, bonus, float(scale))
    return out
