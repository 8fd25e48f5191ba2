"""Gated linear attention: a unidirectional or bidirectional scan along a sequence.

https://arxiv.org/abs/2312.06635; both directions: https://arxiv.org/abs/2405.18425; the bonus:
https://arxiv.org/abs/2404.05892. Each backend, see :mod:`ops.backends`, is a module with
``attend(inputs)``, which is differentiable with respect to all tensors.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from ops.arguments import checked, require_like
from ops.autocast import without_autocast
from ops.backends import backend_of_scan
from ops.linear_attention import chunked, cpu, reference, triton
from ops.linear_attention.reference import Inputs

__all__ = ["BACKENDS", "gated_linear_attention"]

BACKENDS: dict[str, ModuleType] = {
    "reference": reference,
    "chunked": chunked,
    "cpu": cpu,
    "triton": triton,
}


@checked(ranks={"query": 4, "value": 4})
def gated_linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_gate: Tensor,
    log_gate_back: Tensor | None = None,
    bonus: Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Linear attention with per-token decay gates for each key channel.

    A head's state is a K×V matrix S, initially zero. Without ``bonus``, a token attends to itself::

        S = diag(exp(log_gate_t)) S + k_t v_tᵀ          out_t = scale · q_t S

    With ``bonus``, the current token is weighted separately, and its gate applies afterwards::

        out_t = scale · q_t (S + diag(bonus) k_t v_tᵀ)   S = diag(exp(log_gate_t)) S + k_t v_tᵀ

    With ``log_gate_back``, the same recurrence also runs backwards with these gates, and both
    outputs are added. The current token is then counted twice without a bonus, once with it.

    Time and memory are linear in L. States are float32 (float64 for float64 tensors), whatever the
    dtype of the tensors. The computation never divides by a decay, so log gates may be arbitrarily
    small, including ``-inf``.

    Args:
        query, key: (B, L, H, K).
        value: (B, L, H, V).
        log_gate: (B, L, H, K), natural logarithms of the gates, in the dtype of query or in
            float32. They should be at most 0, which is not checked.
        log_gate_back: like ``log_gate``, for the backward direction; default: None, forward only.
        bonus: (H, K), the weight of the current token; default: None, see above.
        scale: multiplies query · key; default: K ** -0.5.
        backend: one of :data:`BACKENDS`; default: the fastest that supports the call.

    Returns:
        (B, L, H, V) in the dtype of query, differentiable with respect to all tensors.

    Raises:
        TypeError: an argument that is not of the annotated type.
        ValueError: incompatible shapes, dtypes or devices, or an unknown ``backend``.
        NotImplementedError: the given ``backend`` does not support this call; it says why.
    """
    of_value = (*query.shape[:-1], value.shape[-1])
    shapes = {
        "key": (key, query.shape),
        "value": (value, of_value),
        "log_gate": (log_gate, query.shape),
        "log_gate_back": (log_gate_back, query.shape),
        "bonus": (bonus, query.shape[-2:]),
    }
    require_like("query", query, shapes, exact=("key", "value"))
    chosen = backend_of_scan(backend, BACKENDS, query, key)
    if query.numel() == 0 or value.numel() == 0:
        chosen = reference
    scale = max(1, query.shape[-1]) ** -0.5 if scale is None else scale
    with without_autocast(query.device):
        exact = torch.promote_types(query.dtype, torch.float32)
        back, bonus = (t if t is None else t.to(exact) for t in (log_gate_back, bonus))
        inputs = Inputs(query, key, value, log_gate.to(exact), back, bonus, float(scale))
        out: Tensor = chosen.attend(inputs)
    return out
