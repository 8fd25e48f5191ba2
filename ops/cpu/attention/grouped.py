"""Softmax attention to few keys on the CPU, on tokens in place, without gradients.

The kernel (``attention.cpp``) covers the cases where torch is slow: narrow heads, few keys, regions
that would have to be gathered, and windows with their own score terms. Sums are accumulated in
float32. Weights are rounded to bfloat16 if products use AVX512-BF16 (float32 is faster with AMX).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ops.arguments import require_shapes
from ops.cpu.call.binding import kernel
from ops.cpu.call.c_arguments import Call, sizes_of
from ops.cpu.call.dispatch import require_dtype
from ops.cpu.call.tensors import dense_channels

_SMALL_MACS = 2e6
LINE = 16  # queries per line of terms, see grouped_attention


def attention_threads(macs: int) -> int:
    """The thread count: one if there is so little work that waking others takes longer."""
    return torch.get_num_threads() if macs >= _SMALL_MACS else 1


def split_heads(x: Tensor, parts: int, num_heads: int) -> tuple[Tensor, ...]:
    """(B, H, W, parts · dim) → a view of each part as (B, H · W, num_heads, head_dim)."""
    return x.flatten(1, 2).unflatten(2, (parts, num_heads, -1)).unbind(2)


def attend(
    query: Tensor, key: Tensor, value: Tensor, out: Tensor, scale: float | None = None
) -> None:
    """:func:`grouped_attention` of all queries to all keys."""
    grouped_attention(query, key, value, out, scale=scale)


@kernel("attention", "attention_forward", returns=0, mutates=("out",))
def grouped_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    rows: Tensor | None = None,
    key_rows: Tensor | None = None,
    routes: Tensor | None = None,
    terms: Tensor | None = None,
    lines: Tensor | None = None,
    kinds: Tensor | None = None,
    scale: float | None = None,
) -> Call:
    """Write softmax(scale · (query · keyᵀ + terms)) · value to ``out``, within groups of tokens.

    Args:
        query: (B, N, heads, head_dim).
        key: (B, M, heads, head_dim).
        value: (B, M, heads, value_dim).
        out: (B, N, heads, value_dim), which may be part of a larger tensor.
        rows: (groups, queries of a group) int32, contiguous: regions or windows; each token is in
            one of them. Default: a single group.
        key_rows: (groups, keys of a group) int32, contiguous; -1 for a token of zeros. Default: the
            keys of the ``rows``.
        routes: (B, groups, topk) int64, the groups whose keys each group attends to; default:
            itself.
        terms: (heads, number of lines, ``LINE``) float32, such as relative position biases and
            masks: each key has a line of numbers for each ``LINE`` queries. Identical lines are
            stored once. Default: none.
        lines: (kinds, ⌈N / LINE⌉, M) int32, indices of lines.
        kinds: (groups,) int32; default: all groups are of the first kind.
        scale: of the logits; default head_dim^-0.5.
    """
    require_shapes(
        query=(query, "batch queries heads dim"),
        key=(key, "batch keys heads dim"),
        value=(value, "batch keys heads value_dim"),
        out=(out, "batch queries heads value_dim"),
    )
    if out.stride(3) != 1:
        raise ValueError(f"out must have dense channels, got strides {out.stride()}")
    require_dtype(query.dtype, key=key, value=value, out=out)
    require_dtype(torch.int32, rows=rows, key_rows=key_rows, lines=lines, kinds=kinds)
    require_dtype(torch.int64, routes=routes)
    require_dtype(torch.float32, terms=terms)
    if rows is not None and rows.numel() != query.shape[1]:
        raise ValueError(
            f"rows must share out {query.shape[1]} tokens to regions, got {tuple(rows.shape)}"
        )
    if rows is not None and terms is not None:
        seen = rows if key_rows is None else key_rows
        require_shapes(
            {"heads": query.shape[2], "lines_of_rows": -(-rows.shape[1] // LINE)},
            rows=(rows, "windows rows"),
            key_rows=(seen, "windows keys"),
            terms=(terms, f"heads lines {LINE}"),
            lines=(lines, "kinds lines_of_rows keys"),
            kinds=(kinds, "windows"),
        )

    def arguments() -> Any:
        q, k, v = map(dense_channels, (query, key, value))
        batch, queries, heads, dim = query.shape
        groups, tokens = (1, queries) if rows is None else rows.shape
        seen = rows if key_rows is None else key_rows
        region_keys = key.shape[1] if seen is None else seen.shape[1]
        chosen = 1 if routes is None else routes.shape[2]
        scores = batch * groups * heads * tokens * region_keys * chosen
        strided = {"query": q, "key": k, "value": v, "out": out}
        return {
            **sizes_of(query, "batch _ heads dim"),
            **{"groups": groups, "queries": tokens, "region_keys": region_keys, "routes": chosen},
            "value_dim": value.shape[3],
            **{f"{name}_stride": t.stride()[:3] for name, t in strided.items()},
            "term_lines": 0 if terms is None else terms.shape[1],
            "scale": dim**-0.5 if scale is None else scale,
            "threads": attention_threads(scores * (dim + value.shape[3])),
            **strided,
            "regions": None if routes is None else routes.contiguous(),
        }

    return Call(None, arguments if out.numel() else dict)
