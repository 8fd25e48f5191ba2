"""Softmax attention to few keys on the CPU, on tokens in place, without gradients.

The kernel (``attention.cpp``) covers the cases where torch is slow: narrow heads, few keys, regions
that would have to be gathered, and windows with their own score terms. Sums are accumulated in
float32. Weights are rounded to bfloat16 if products use AVX512-BF16 (float32 is faster with AMX).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ops.arguments import require_shapes
from ops.cpu.call.binding import kernel
from ops.cpu.call.c_arguments import Call, sizes_of
from ops.cpu.call.dispatch import require_dtype
from ops.cpu.call.tensors import dense_channels

_SMALL_MACS = 2e6
LINE = 16  # queries per line, see ScoreTerms


class ScoreTerms(NamedTuple):
    """Terms added to scores, such as relative position biases and masks.

    Each key has a line of ``LINE`` numbers for each ``LINE`` queries. Identical lines are stored
    once.

    Attributes:
        values: (heads, number of lines, LINE) float32, added before scores are scaled.
        lines: (kinds, ⌈N / LINE⌉, M) int32, indices of lines.
        kinds: (groups,) int32, or None if all groups are of the first kind.
    """

    values: Tensor
    lines: Tensor
    kinds: Tensor | None


_NO_TERMS = (None, None, None)


def attention_threads(macs: int) -> int:
    """The thread count: one if there is so little work that waking others takes longer."""
    return torch.get_num_threads() if macs >= _SMALL_MACS else 1


def split_heads(x: Tensor, parts: int, num_heads: int) -> tuple[Tensor, ...]:
    """(B, H, W, parts · dim) → a view of each part as (B, H · W, num_heads, head_dim)."""
    return x.flatten(1, 2).unflatten(2, (parts, num_heads, -1)).unbind(2)


def attend(
    query: Tensor, key: Tensor, value: Tensor, out: Tensor, scale: float | None = None
) -> None:
    """Write softmax(scale · query · keyᵀ) · value to ``out``, which may be part of a larger tensor.

    Args:
        query: (B, N, heads, head_dim).
        key: (B, M, heads, head_dim).
        value: (B, M, heads, value_dim).
        out: (B, N, heads, value_dim).
        scale: of the logits; default head_dim^-0.5.
    """
    grouped_attention(query, key, value, out, None, None, None, *_NO_TERMS, scale)


def attend_regions(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows: Tensor,
    routes: Tensor | None = None,
    scale: float | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Attend from the tokens of each region to all tokens of the regions it routes to.

    Args:
        query, key: (B, N, heads, head_dim), a map's tokens.
        value: (B, N, heads, value_dim).
        rows: (regions, tokens of a region) int32, contiguous: the tokens of each region.
        routes: (B, regions, topk) int64, the regions that each region attends to; default itself.
        scale: of the logits; default head_dim^-0.5.
        out: (B, N, heads, value_dim), the result; default a new contiguous tensor.

    Returns:
        (B, N, heads, value_dim).
    """
    if out is None:
        out = value.new_empty(*query.shape[:3], value.shape[3])
    grouped_attention(query, key, value, out, rows, None, routes, *_NO_TERMS, scale)
    return out


@kernel("attention", "attention_forward", returns=0, mutates=("out",))
def grouped_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    rows: Tensor | None,
    key_rows: Tensor | None,
    routes: Tensor | None,
    terms: Tensor | None,
    lines: Tensor | None,
    kinds: Tensor | None,
    scale: float | None,
) -> Call:
    """The kernel of the functions above: ``softmax(scale · (query · keyᵀ + terms)) · value``.

    Args:
        query, key, value, out, routes, scale: as there.
        rows: (windows, tokens of a window) int32, contiguous: the query tokens of each region or
            window; each token is in one of them.
        key_rows: (windows, keys of a window) int32, contiguous: the key tokens of each window, -1
            for a token of zeros; default: its query tokens.
        terms, lines, kinds: see :class:`ScoreTerms`, for the tokens of a window and its keys.
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
