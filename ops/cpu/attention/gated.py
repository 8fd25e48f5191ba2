"""Attention with rotations, a bias and a gate on the CPU: softmax, and rank-augmented linear.

The kernels, that of :mod:`ops.cpu.attention.grouped` and ``linear_attention.cpp``, read queries,
keys, values and gates from the output of one projection. The linear one, see :mod:`ops.attention`,
computes in float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ops.arguments import require_shapes
from ops.cpu.attention.grouped import attention_threads
from ops.cpu.call.binding import kernel
from ops.cpu.call.c_arguments import Call, sizes_of
from ops.cpu.call.dispatch import require_dtype
from ops.cpu.threads import VALUES, threads_for

_EPS = 1e-6
_WHOLE = 32  # divides head_dim: two vectors of the widest instruction set


def heads_unavailable(head_dim: int) -> str | None:
    """``None`` if kernels can rotate heads of ``head_dim`` channels, else the reason."""
    if head_dim % _WHOLE:
        return f"the kernel needs head dims divisible by {_WHOLE}, not {head_dim}"
    return None


def _allocate(
    qkvo: Tensor, bias: Tensor, row_table: Tensor, column_table: Tensor, num_heads: int
) -> Tensor:
    """Check the arguments of :func:`rank_augmented_attention` and allocate its result."""
    dim = bias.shape[-1]
    head_dim = dim // num_heads
    require_shapes(
        {"head_dim": head_dim, "parts": 4 * dim},
        bias=(bias, "batch height width dim"),
        qkvo=(qkvo, "batch height width parts"),
        row_table=(row_table, "height head_dim"),
        column_table=(column_table, "width head_dim"),
    )
    require_dtype(qkvo.dtype, bias=bias)
    require_dtype(torch.float32, row_table=row_table, column_table=column_table)
    if not qkvo.is_contiguous() or dim % num_heads:
        raise ValueError(
            f"qkvo must be contiguous and {num_heads} heads divide {dim} channels, got strides "
            f"{qkvo.stride()}"
        )
    reason = heads_unavailable(head_dim)
    if reason is not None:
        raise RuntimeError(reason)
    return torch.empty_like(bias, memory_format=torch.contiguous_format)


def _parts(qkvo: Tensor) -> dict[str, tuple[Tensor, int]]:
    """Queries, keys, values and gates of both kernels, by the names of their structures' fields."""
    step = qkvo.shape[-1] // 4 * qkvo.element_size()
    return {name: (qkvo, i * step) for i, name in enumerate(("query", "key", "value", "gate"))}


@kernel("linear_attention", "linear_attention_forward")
def rank_augmented_attention(
    qkvo: Tensor, bias: Tensor, row_table: Tensor, column_table: Tensor, num_heads: int
) -> Call:
    """``(rank_augmented_linear_attention(q, k, v, rotations of the map) + bias) * gate``.

    Args:
        qkvo: (B, H, W, 4·dim), contiguous: queries, keys, values and gates.
        bias: (B, H, W, dim).
        row_table, column_table: (H, head_dim) and (W, head_dim) in float32: the cosines of the
            rotation angles of channel pairs per row and column, then their sines, negated for even
            channels.
        num_heads: divides dim; :func:`heads_unavailable` must accept the resulting head_dim.

    Returns:
        (B, H, W, dim), contiguous.
    """
    out = _allocate(qkvo, bias, row_table, column_table, num_heads)

    def arguments() -> dict[str, Any]:
        tokens, dim = bias.shape[1] * bias.shape[2], bias.shape[3]
        head_dim = dim // num_heads
        whole = (tokens * dim, dim, head_dim)
        return {
            **sizes_of(qkvo, "batch height width _"),
            **{"heads": num_heads, "dim": head_dim, "scale": head_dim**-0.5, "eps": _EPS},
            "stride": (4 * tokens * dim, 4 * dim, head_dim),
            **{"bias_stride": whole, "out_stride": whole},
            "threads": threads_for(bias.numel(), VALUES),
            **_parts(qkvo),
        }

    return Call(out, arguments)


@kernel("attention", "attention_forward")
def gated_attention(
    qkvo: Tensor, bias: Tensor, row_table: Tensor, column_table: Tensor, num_heads: int
) -> Call:
    """``(softmax attention of queries and keys rotated by the map + bias) * gate``.

    Args and Returns: see :func:`rank_augmented_attention`.
    """
    out = _allocate(qkvo, bias, row_table, column_table, num_heads)
    batch, height, width, dim = bias.shape

    def arguments() -> Any:
        tokens, head_dim = height * width, dim // num_heads
        parts = _parts(qkvo)
        whole, projected = (tokens * dim, dim, head_dim), (4 * tokens * dim, 4 * dim, head_dim)
        return {
            **{"batch": batch, "groups": 1, "heads": num_heads, "routes": 1, "width": width},
            **{"queries": tokens, "region_keys": tokens, "dim": head_dim, "value_dim": head_dim},
            **{f"{name}_stride": projected for name in parts},
            **{"out_stride": whole, "bias_stride": whole, "scale": head_dim**-0.5},
            "threads": attention_threads(2 * bias.numel() * tokens),
            **parts,
        }

    return Call(out, arguments)
