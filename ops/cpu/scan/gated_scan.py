"""Gated linear attention on the CPU, see :mod:`ops.linear_attention`.

Forward (``forward.h``), backward (``backward.h``), and inside the attention of ViG and of VRWKV6
(``gated_scan.cpp``).

States, gates and sums are in float32.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ops.arguments import require_shapes
from ops.cpu.call.binding import kernel
from ops.cpu.call.c_arguments import Call
from ops.cpu.call.dispatch import require_dtype
from ops.cpu.call.tensors import dense_channels
from ops.cpu.threads import MACS, threads_for


@kernel("gated_scan", "gated_scan_forward", large_results=True)
def gated_scan(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_gate: Tensor,
    log_gate_back: Tensor | None,
    bonus: Tensor | None,
    scale: float,
) -> Call:
    """The attention; shapes as in :mod:`ops.linear_attention`. No gradients.

    Gates and bonus are float32, query, key and value of one dtype.
    """
    require_dtype(torch.float32, log_gate=log_gate, log_gate_back=log_gate_back, bonus=bonus)
    require_dtype(query.dtype, key=key, value=value)

    def arguments() -> dict[str, Any]:
        of_call = _sizes(*query.shape, value.shape[-1])
        inputs = _inputs(query, key, value, log_gate, log_gate_back)
        return {**of_call, **inputs, "apart": bonus is not None}

    return Call(query.new_empty(value.shape), arguments)


@kernel("gated_scan", "gated_scan_backward", returns=5, large_results=True)
def gated_scan_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_gate: Tensor,
    log_gate_back: Tensor | None,
    apart: bool,
    scale: float,
) -> Call:
    """Gradients of query, key, value and both gates, in float32 and contiguous.

    With ``apart``, gradients of a token through itself, by the bonus, are omitted. The last
    gradient is an empty tensor if there is no second gate.

    Gates are float32, the other tensors of one dtype.
    """
    require_dtype(torch.float32, log_gate=log_gate, log_gate_back=log_gate_back)
    require_dtype(query.dtype, key=key, value=value, grad_out=grad_out)
    inputs = (query, key, value, log_gate, log_gate_back)
    grads = tuple(query.new_empty(0 if t is None else t.shape, dtype=torch.float32) for t in inputs)

    def arguments() -> dict[str, Any]:
        names = ("grad_query", "grad_key", "grad_value", "grad_gate", "grad_gate_back")
        return {
            **_sizes(*query.shape, value.shape[-1]),
            **_inputs(*inputs),
            "grad_out": _sequence(grad_out),
            **dict(zip(names, grads, strict=True)),
            "bfloat16": query.dtype == torch.bfloat16,
        }

    return Call(grads, arguments)


@kernel("gated_scan", "gated_scan_mixed", large_results=True)
def mixed_scan(
    projected: Tensor,
    decay: Tensor,
    local: Tensor,
    norm: Tensor,
    local_norm: Tensor,
    num_heads: int,
    eps: float,
    activation: str = "none",
) -> Call:
    """The scan of ViG's attention in both directions, mixed with its local branch.

    ``activation(g * rms_norm(scan) + (1 - g) * rms_norm(local))`` per head, where g is the sigmoid
    of ``gate``, and the gates of the scan are ``sigmoid(decay) ** (1 / 16)``. No gradients.

    Args:
        projected: (B, L, 3·dim or more): query and key of dim / 2 channels each, value and gate of
            dim each; further channels are not read. The query is already scaled.
        decay: (B, L, dim), dim / 2 for each direction, forward first.
        local: (B, L, dim).
        norm, local_norm: (dim / num_heads,) float32, the weights of both norms.
        num_heads: divides dim / 2.
        eps: of both norms.
        activation: "none" or "silu".

    Returns:
        (B, L, dim), contiguous.
    """
    batch, tokens, dim = local.shape
    require_shapes(
        {"width": dim // num_heads},
        local=(local, "batch tokens dim"),
        decay=(decay, "batch tokens dim"),
        projected=(projected, "batch tokens channels"),
        norm=(norm, "width"),
        local_norm=(local_norm, "width"),
    )
    if projected.shape[2] < 3 * dim or dim % (2 * num_heads):
        raise ValueError(
            f"projected must have {3 * dim} channels or more and {num_heads} heads divide "
            f"{dim // 2}, got {projected.shape[2]}"
        )
    if activation not in ("none", "silu"):
        raise ValueError(f"activation must be 'none' or 'silu', got {activation!r}")
    require_dtype(torch.float32, norm=norm, local_norm=local_norm)
    require_dtype(local.dtype, projected=projected, decay=decay)

    def arguments() -> dict[str, Any]:
        half = dim // 2
        keys, values = half // num_heads, dim // num_heads
        return {
            **_sizes(batch, tokens, num_heads, keys, values),
            "scale": 1.0,
            "query": _heads(projected, 0, keys),
            "key": _heads(projected, half, keys),
            "value": _heads(projected, dim, values),
            "gate": _heads(projected, 2 * dim, values),
            "decay": _heads(decay, 0, keys),
            "decay_back": _heads(decay, half, keys),
            "local": _heads(local, 0, values),
        }

    return Call(local.new_empty(local.shape), arguments)


@kernel("gated_scan", "gated_scan_normed", large_results=True)
def normed_scan(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    decay: Tensor,
    decay_bias: Tensor,
    bonus: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
) -> Call:
    """The scan of VRWKV6's attention in both directions, and the norm of each head after it.

    The gates of both are ``exp(-exp(decay + decay_bias))``. No gradients.

    Args:
        query, key: (B, L, heads, K).
        value: (B, L, heads, V).
        decay: (B, L, heads, K).
        decay_bias, bonus: (heads, K) float32.
        weight, bias: (heads, V) float32, of the norm.
        eps: of the norm.

    Returns:
        (B, L, heads, V), contiguous.
    """
    axes = "batch tokens heads"
    sequences = {"query": query, "key": key, "decay": decay}
    require_shapes(
        **{name: (t, f"{axes} keys") for name, t in sequences.items()},
        value=(value, f"{axes} values"),
        decay_bias=(decay_bias, "heads keys"),
        bonus=(bonus, "heads keys"),
        weight=(weight, "heads values"),
        bias=(bias, "heads values"),
    )
    require_dtype(torch.float32, decay_bias=decay_bias, bonus=bonus, weight=weight, bias=bias)
    require_dtype(query.dtype, key=key, value=value, decay=decay)

    def arguments() -> dict[str, Any]:
        return {
            **_sizes(*query.shape, value.shape[-1]),
            **{name: _sequence(t) for name, t in {**sequences, "value": value}.items()},
            **{"apart": True, "scale": 1.0},
        }

    return Call(query.new_empty(value.shape), arguments)


def _inputs(
    query: Tensor, key: Tensor, value: Tensor, log_gate: Tensor, log_gate_back: Tensor | None
) -> dict[str, Any]:
    return {
        **{"query": _sequence(query), "key": _sequence(key), "value": _sequence(value)},
        **{"gate": _sequence(log_gate), "gate_back": _sequence(log_gate_back)},
    }


def _sequence(t: Tensor | None) -> dict[str, Any] | None:
    """(B, L, H, C); copied unless the channels are dense."""
    if t is None:
        return None
    t = dense_channels(t)
    return dict(zip(("data", "batch", "token", "head"), (t, *t.stride()[:-1]), strict=True))


def _heads(t: Tensor, first: int, width: int) -> dict[str, Any]:
    """Heads of ``width`` channels each of (B, L, C), from channel ``first`` on."""
    t = dense_channels(t)
    batch, token, _ = t.stride()
    begin = (t, first * t.element_size())
    return {"data": begin, "batch": batch, "token": token, "head": width}


def _sizes(*sizes: int) -> dict[str, int]:
    names = ("batch", "tokens", "heads", "dim", "value_dim")
    named = dict(zip(names, sizes, strict=True))
    return {**named, "threads": threads_for(math.prod(sizes), MACS)}
