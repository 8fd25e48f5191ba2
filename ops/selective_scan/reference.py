"""Reference implementation of the selective scan: token by token.

https://arxiv.org/abs/2312.00752. Any device and dtype.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Inputs", "scan"]


class Inputs(NamedTuple):
    """The arguments of :func:`ops.selective_scan.selective_scan`, in its order."""

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    delta_bias: Tensor | None
    delta_softplus: bool


def scan(inputs: Inputs) -> Tensor:
    """See :func:`ops.selective_scan.selective_scan`."""
    u, delta, A, B, C, D, delta_bias, delta_softplus = inputs
    channels, exact = u.shape[1], torch.promote_types(u.dtype, torch.float32)
    step = delta.to(exact) if delta_bias is None else delta.to(exact) + delta_bias[:, None]
    step = F.softplus(step) if delta_softplus else step
    # (L, B, channels, N)
    B, C = (t.movedim(3, 0).to(exact).repeat_interleave(channels // t.shape[1], 2) for t in (B, C))
    state, outs = u.new_zeros(*u.shape[:2], A.shape[1], dtype=exact), []
    for t in range(u.shape[2]):
        now = step[..., t, None]
        state = (now * A).exp() * state + now * u[..., t, None] * B[t]
        outs.append((C[t] * state).sum(-1))
    out = torch.stack(outs, -1) if outs else step * u
    return (out if D is None else out + D[:, None] * u).to(u.dtype)
