"""Gated linear attention as Triton kernels, with gradients.

https://arxiv.org/abs/2312.06635. The kernels support NVIDIA GPUs with compute capability 8.0 or
newer, and any device in Triton's interpreter (``TRITON_INTERPRET=1`` when triton is first
imported), which is how they are tested. States and sums are float32; results are deterministic.
"""

from __future__ import annotations

from torch import Tensor

from ops.linear_attention.reference import Inputs
from ops.triton_devices import problem_of

__all__ = ["attend", "unavailable"]

_MAX_DIM = 256


def unavailable(query: Tensor, key: Tensor) -> str | None:
    """None if the kernels support this call, else the reason."""
    if query.shape[-1] > _MAX_DIM:
        return f"the kernels support up to {_MAX_DIM} key channels per head, got {query.shape[-1]}"
    return problem_of(query)


def attend(inputs: Inputs) -> Tensor:
    """Gated linear attention; shapes as in :mod:`ops.linear_attention`."""
    # Imported on first use: registering operators takes time, and triton is optional.
    from ops.linear_attention.triton.kernels import gated_scan

    query, key, value, log_gate, log_gate_back, bonus, scale = inputs
    out: Tensor = gated_scan(query, key, value, log_gate, log_gate_back, bonus is not None, scale)
    if bonus is not None:
        weight = (query.float() * bonus * key).sum(-1, keepdim=True)
        out = out + scale * weight * value
    return out.to(query.dtype)
