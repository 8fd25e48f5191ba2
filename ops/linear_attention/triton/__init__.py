"""Gated linear attention as Triton kernels, with gradients.

https://arxiv.org/abs/2312.06635. The kernels run on NVIDIA GPUs from compute capability 8.0 on, and
on any device in Triton's interpreter (``TRITON_INTERPRET=1`` when triton is first imported), which
is how they are tested. States and sums are of float32; repeated calls give equal bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ops.triton_devices import device_problem

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
    # On first use: to register operators takes time, and triton need not be installed.
    from ops.linear_attention.triton.operators import gated_scan

    back = None if log_gate_back is None else log_gate_back.float()
    apart = bonus is not None
    out: Tensor = gated_scan(query, key, value, log_gate.float(), back, apart, float(scale))
    if bonus is not None:
        weight = (query.float() * bonus.float() * key).sum(-1, keepdim=True)
        out = out + scale * weight * value
    return out.to(query.dtype)
