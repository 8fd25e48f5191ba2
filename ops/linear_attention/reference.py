"""Reference implementation of gated linear attention: a token-by-token scan.

https://arxiv.org/abs/2312.06635. Any device and dtype.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Inputs", "attend"]


class Inputs(NamedTuple):
    """The arguments of :func:`ops.linear_attention.gated_linear_attention`, in its order.

    Gates and bonus are in float32 or higher.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    log_gate: Tensor
    log_gate_back: Tensor | None
    bonus: Tensor | None
    scale: float


def attend(inputs: Inputs) -> Tensor:
    """Gated linear attention; shapes as in :mod:`ops.linear_attention`."""
    query, key, value, log_gate, log_gate_back, bonus, scale = inputs
    precise = torch.promote_types(query.dtype, torch.float32)
    q, k, v = query.to(precise) * scale, key.to(precise), value.to(precise)
    out = _scan(q, k, v, log_gate.exp(), bonus is not None)
    if log_gate_back is not None:
        gate = log_gate_back.exp().flip(1)
        back = _scan(q.flip(1), k.flip(1), v.flip(1), gate, bonus is not None)
        out = out + back.flip(1)
    if bonus is not None:
        out = out + (q * bonus * k).sum(-1, keepdim=True) * v
    return out.to(query.dtype)


def _scan(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, apart: bool) -> Tensor:
    """One direction: (B, L, H, V). ``apart``: exclude the current token."""
    batch, _, heads, dim = k.shape
    state = k.new_zeros(batch, heads, dim, v.shape[-1])
    outs = []
    for t in range(q.shape[1]):
        before = state
        state = gate[:, t, ..., None] * state + k[:, t, ..., None] * v[:, t, :, None]
        outs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], before if apart else state))
    return torch.stack(outs, dim=1) if outs else v
