"""The selective scan in plain torch, by scans in chunks of 16 tokens; it trains and exports.

Within chunks, which are scanned side by side, tokens follow each other. The states at their ends
are a shorter sequence of the same kind. Nothing is divided by a decay, which would overflow after
few tokens (https://arxiv.org/abs/2312.00752 scans pairs of a decay and a state for that reason).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ops.selective_scan.reference import Inputs

__all__ = ["scan"]

_CHUNK = 16  # tokens
_LEVELS = 2  # of chunks, where the number of tokens is not known


def scan(inputs: Inputs) -> Tensor:
    """See :func:`ops.selective_scan.selective_scan`.

    Any device, any dtype. Memory grows with L · channels · states.
    """
    u, delta, A, B, C, D, delta_bias, delta_softplus = inputs
    exact = torch.promote_types(u.dtype, torch.float32)
    groups, dtype = B.shape[1], u.dtype
    # Tokens first, so that those of a chunk's place are contiguous.
    u, delta, B, C = (t.to(exact).movedim(-1, 0) for t in (u, delta, B, C))
    step = delta if delta_bias is None else delta + delta_bias
    step = F.softplus(step) if delta_softplus else step
    exponent = (step[..., None] * A).unflatten(2, (groups, -1))  # (L, B, G, channels / G, N)
    added = (step * u).unflatten(2, (groups, -1))[..., None] * B[..., None, :]
    state = _scan(exponent, added)
    out = (state * C[..., None, :]).sum(-1).flatten(2)
    out = out if D is None else out + D * u
    return out.movedim(0, -1).to(dtype)


def _scan(exponent: Tensor, added: Tensor, level: int = 0) -> Tensor:
    """The state after each token: the previous one times exp(exponent), plus the token's input.

    Both are (tokens, …), and so is the result.
    """
    tokens = exponent.shape[0]
    chunk = min(_CHUNK, tokens) if isinstance(tokens, int) else _CHUNK
    if not isinstance(tokens, int) and level == _LEVELS:
        return _scan_pairs(exponent, added)
    exponent, added = (
        F.pad(t, (0, 0) * (t.ndim - 1) + (0, -tokens % chunk)).unflatten(0, (-1, chunk))
        for t in (exponent, added)
    )
    decays = exponent.exp().unbind(1)
    states, kept = [added[:, 0]], [decays[0]]  # of the chunk's tokens so far, and of those before
    for decay, now in zip(decays[1:], added.unbind(1)[1:], strict=True):
        states.append(decay * states[-1] + now)
        kept.append(decay * kept[-1])
    state = torch.stack(states, 1)
    if not isinstance(tokens, int) or tokens > chunk:
        ends = _scan(exponent.sum(1), states[-1], level + 1)
        before = torch.cat([torch.zeros_like(ends[:1]), ends[:-1]])
        state = state + torch.stack(kept, 1) * before[:, None]
    return state.flatten(0, 1)[:tokens]


def _scan_pairs(exponent: Tensor, added: Tensor) -> Tensor:
    """The same by the decays between all pairs of tokens: a graph for any number of them."""
    place = torch.arange(exponent.shape[0], device=exponent.device)
    later = place[:, None] - place
    later = later.view(*later.shape, *[1] * (exponent.ndim - 1))  # (t, s, …)
    between = torch.where(later > 0, exponent[:, None], 0.0).cumsum(0)
    return (torch.where(later >= 0, between, -torch.inf).exp() * added).sum(1)
