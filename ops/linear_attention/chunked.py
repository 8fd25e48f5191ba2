"""Gated linear attention by matrix products over chunks of tokens, for training.

Within a chunk, it uses the weights of pairs of tokens; between chunks, it uses states, computed by
a scan with doubling steps. Chunks are as in https://arxiv.org/abs/2312.06635, but without dividing
by decays, which would overflow for small gates: the decay between two tokens is the exponential of
the sum of the log gates between them, each summed separately.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ops.linear_attention.reference import Inputs

__all__ = ["attend"]

_CHUNK = 16  # tokens


def attend(inputs: Inputs) -> Tensor:
    """Gated linear attention; shapes as in :mod:`ops.linear_attention`.

    Any device, any dtype. Memory grows with 16 · L · K.
    """
    query, key, value, log_gate, log_gate_back, bonus, scale = inputs
    precise = torch.promote_types(query.dtype, torch.float32)
    q, k, v, gate = (t.to(precise).transpose(1, 2) for t in (query, key, value, log_gate))
    q, apart = q * scale, bonus is not None
    if log_gate_back is None:
        out = _scan(q, k, v, gate, apart)
    else:
        back = log_gate_back.transpose(1, 2)
        both = ((q, q.flip(2)), (k, k.flip(2)), (v, v.flip(2)), (gate, back.flip(2)))
        q_both, k_both, v_both, gates = map(torch.stack, both)
        outs = _scan(q_both, k_both, v_both, gates, apart)
        out = outs[0] + outs[1].flip(2)
    if bonus is not None:
        weight = (q * bonus[:, None] * k).sum(-1, keepdim=True)
        out = out + weight * v
    return out.transpose(1, 2).to(query.dtype)


def _scan(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, apart: bool) -> Tensor:
    """Each direction: (…, L, K) and (…, L, V) → (…, L, V)."""
    tokens = q.shape[-2]
    # Padding at the end: tokens without a key don't affect earlier ones. The graph of a single
    # chunk would be one for a single chunk only, so an exported one has a further chunk.
    padding = -tokens % _CHUNK + (_CHUNK if torch.compiler.is_exporting() else 0)
    q, k, v, gate = (
        F.pad(t, (0, 0, 0, padding)).unflatten(-2, (-1, _CHUNK)) for t in (q, k, v, gate)
    )  # (…, N, C, ·)
    decay = _decays(gate)  # (…, N, C + 1, C + 1, K); row and column 0 precede the chunk
    seen = decay[..., :-1, :, :] if apart else decay[..., 1:, :, :]  # (…, C, C + 1, K)
    begin, within = seen[..., 0, :], seen[..., 1:, :]
    weights = torch.matmul(within * k[..., None, :, :], q[..., None])  # (…, N, C, C, 1)
    kept = decay[..., -1, :, :]  # (…, N, C + 1, K), to the end of the chunk
    added = torch.matmul((k * kept[..., 1:, :]).mT, v)  # (…, N, K, V)
    if torch.compiler.is_exporting():
        states = _states_of_any_number(gate.sum(-2), added)
    else:
        states = _states(kept[..., 0, :], added)
    out = torch.matmul(weights.squeeze(-1), v) + torch.matmul(q * begin, states)
    return out.flatten(-3, -2)[..., :tokens, :]


def _decays(gate: Tensor) -> Tensor:
    """Decay from token s to token t of a chunk: (…, C, K) → (…, t: C + 1, s: C + 1, K).

    It is 0 for t < s. Index 0 is the position before the chunk.
    """
    size = gate.shape[-2] + 1
    ones = torch.ones(size, size, dtype=torch.bool, device=gate.device)
    gate = F.pad(gate, (0, 0, 1, 0))[..., :, None, :]
    between = torch.where(ones.tril(-1)[..., None], gate, 0.0).cumsum(-3)
    return torch.where(ones.tril()[..., None], between, -torch.inf).exp()


def _states(decay: Tensor, added: Tensor) -> Tensor:
    """The state before each chunk, from decays (…, N, K) and the chunks' updates (…, N, K, V).

    After step i, each entry has the accumulated updates of the last 2^i chunks.
    """
    decay = decay[..., None]
    step = 1
    while step < added.shape[-3] - 1:
        added = added + decay * F.pad(added, (0, 0, 0, 0, step, 0))[..., :-step, :, :]
        decay = decay * F.pad(decay, (0, 0, 0, 0, step, 0))[..., :-step, :, :]
        step *= 2
    return F.pad(added, (0, 0, 0, 0, 1, 0))[..., :-1, :, :]


def _states_of_any_number(gate: Tensor, added: Tensor) -> Tensor:
    """Like :func:`_states`, from the decays between all pairs of chunks, without doubling steps.

    Its graph is independent of the number of chunks; ``gate`` has the chunks' summed log gates.
    """
    decay = _decays(gate)[..., :-1, 1:, :]  # (…, N, N, K)
    return torch.einsum("...nmk,...mkv->...nkv", decay, added)
