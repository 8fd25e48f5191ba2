"""Softmax attention on the CPU to few keys, of tokens where they lie, without gradients.

The kernel (``ops/native/attention.cpp``) is for what torch's is slow at: narrow heads, few keys,
regions that would have to be gathered, and windows with terms of their own. It takes float32 or
bfloat16; sums are of float32, and weights are rounded to bfloat16 on CPUs that multiply it by
AVX512-BF16 (those with AMX are faster in float32).
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ops import native
from ops.native.eager import is_plain_call, require_dtype, unsupported_tensors

__all__ = [
    "KERNEL",
    "LINE",
    "SMALL_MACS",
    "Problem",
    "ScoreTerms",
    "Tensors",
    "attend",
    "attend_regions",
    "attend_windows",
    "outruns_torch",
    "split_heads",
    "unsupported",
]

KERNEL = "attention"
SMALL_MACS = 2e6  # below it one thread is quicker than waking others
LINE = 16  # queries, see ScoreTerms
# Of bfloat16: with AMX torch multiplies more of them faster.
_MOST_KEYS = 256


class Problem(ctypes.Structure):
    """``attention::Problem`` of ops/native/attention.h."""

    _fields_ = [
        *(
            (name, ctypes.c_int64)
            for name in (
                *("batch", "groups", "heads", "queries", "region_keys", "routes", "dim"),
                "value_dim",
            )
        ),
        *(
            (f"{name}_stride", ctypes.c_int64 * 3)
            for name in ("query", "key", "value", "out", "bias", "gate")
        ),
        *((name, ctypes.c_int64) for name in ("width", "term_lines")),
        ("scale", ctypes.c_double),
        *((name, ctypes.c_int64) for name in ("bfloat16", "threads")),
    ]


class Tensors(ctypes.Structure):
    """``attention::Tensors`` of ops/native/attention.h."""

    _fields_ = [
        (name, ctypes.c_void_p)
        for name in (
            *("query", "key", "value", "rows", "key_rows", "regions", "row_table", "column_table"),
            *("terms", "lines", "kinds", "bias", "gate", "output"),
        )
    ]


class ScoreTerms(NamedTuple):
    """What is added to scores, such as biases of relative positions and masks.

    Every key has a line of ``LINE`` numbers for every ``LINE`` queries; many lines are the same.

    Attributes:
        values: (heads, number of lines, LINE) float32, to be added before scores are scaled.
        lines: (kinds, ⌈N / LINE⌉, M) int32, which line it is.
        kinds: (groups,) int32, or None for the first kind everywhere.
    """

    values: Tensor
    lines: Tensor
    kinds: Tensor | None


def unsupported(device: torch.device, dtype: torch.dtype) -> str | None:
    """``None`` if the kernel takes such tensors, else the reason in words.

    The first call on a machine compiles the kernel, which takes some seconds.
    """
    return unsupported_tensors(KERNEL, device, dtype)


def outruns_torch(dtype: torch.dtype, keys: int) -> bool:
    """Whether the kernel attends to so many keys faster than torch does."""
    return dtype == torch.float32 or keys <= _MOST_KEYS or not torch.cpu._is_amx_tile_supported()


def split_heads(x: Tensor, parts: int, num_heads: int) -> tuple[Tensor, ...]:
    """(B, H, W, parts · dim) → each of the parts as (B, H · W, num_heads, head_dim), views."""
    return x.flatten(1, 2).unflatten(2, (parts, num_heads, -1)).unbind(2)


def attend(
    query: Tensor, key: Tensor, value: Tensor, out: Tensor, scale: float | None = None
) -> None:
    """softmax(scale · query · keyᵀ) · value into ``out``, which may be a part of a larger tensor.

    Args:
        query: (B, N, heads, head_dim).
        key: (B, M, heads, head_dim).
        value: (B, M, heads, value_dim).
        out: (B, N, heads, value_dim).
        scale: of the logits; default head_dim^-0.5.

    Raises:
        ValueError: shapes or dtypes that do not go together.
        RuntimeError: the kernel is not available here (:func:`unsupported` tells beforehand).
    """
    _attend(query, key, value, out, scale=scale)


def attend_regions(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows: Tensor,
    routes: Tensor | None = None,
    scale: float | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """The tokens of each region attend to all tokens of the regions that it chose.

    Args:
        query, key: (B, N, heads, head_dim), a map's tokens.
        value: (B, N, heads, value_dim).
        rows: (regions, tokens of a region) int32, contiguous: which tokens are a region's.
        routes: (B, regions, topk) int64, the regions that each one chose; default itself.
        scale: of the logits; default head_dim^-0.5.
        out: (B, N, heads, value_dim), where the result goes; default a contiguous tensor.

    Returns:
        (B, N, heads, value_dim).

    Raises:
        ValueError: shapes or dtypes that do not go together.
        RuntimeError: the kernel is not available here (:func:`unsupported` tells beforehand).
    """
    _require_all_tokens(query, rows)
    if out is None:
        out = value.new_empty(*query.shape[:3], value.shape[3])
    _attend(query, key, value, out, rows, routes=routes, scale=scale)
    return out


def attend_windows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows: Tensor,
    key_rows: Tensor,
    terms: ScoreTerms,
    out: Tensor,
) -> None:
    """The queries of each window attend to the keys of a window, with terms added to the scores.

    ``softmax(head_dim^-0.5 · (query · keyᵀ + terms)) · value``

    Args:
        query, key: (B, N, heads, head_dim), a map's tokens.
        value: (B, N, heads, value_dim).
        rows: (windows, tokens of a window) int32, contiguous: whose queries are a window's; each
            token is in one window.
        key_rows: (windows, keys of a window) int32, contiguous: which tokens it sees; -1 for a
            token of zeros.
        terms: those of N tokens of a window and M keys.
        out: (B, N, heads, value_dim), where the result goes.

    Raises:
        ValueError: shapes or dtypes that do not go together.
        RuntimeError: the kernel is not available here (:func:`unsupported` tells beforehand).
    """
    _require_all_tokens(query, rows)
    _attend(query, key, value, out, rows, key_rows, terms=terms)


def _require_all_tokens(query: Tensor, rows: Tensor) -> None:
    if rows.numel() != query.shape[1]:
        raise ValueError(
            f"rows must share out {query.shape[1]} tokens to regions, got {tuple(rows.shape)}"
        )


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    rows: Tensor | None = None,
    key_rows: Tensor | None = None,
    *,
    routes: Tensor | None = None,
    terms: ScoreTerms | None = None,
    scale: float | None = None,
) -> None:
    of_terms: tuple[Tensor | None, ...] = (None, None, None) if terms is None else terms
    inputs: tuple[Any, ...] = (query, key, value, out, rows, key_rows, routes, *of_terms, scale)
    if is_plain_call(inputs[:-1]):
        _run(*inputs)
    else:
        torch.ops.vision_backbones.grouped_attention.default(*inputs)


_library = torch.library.Library("vision_backbones", "FRAGMENT")
_library.define(
    "grouped_attention(Tensor query, Tensor key, Tensor value, Tensor(a!) out, Tensor? rows, "
    "Tensor? key_rows, Tensor? routes, Tensor? terms, Tensor? lines, Tensor? kinds, float? scale) "
    "-> ()"
)


@torch.library.register_fake("vision_backbones::grouped_attention", lib=_library)
def _check(
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
) -> None:
    batch, queries, heads, dim = query.shape
    keys, value_dim = value.shape[1], value.shape[3]
    fits = key.shape == (batch, keys, heads, dim)
    fits &= value.shape == (batch, keys, heads, value_dim)
    if not fits or out.shape != (batch, queries, heads, value_dim) or out.stride(3) != 1:
        raise ValueError(
            "query must be (B, N, heads, head_dim), key (B, M, heads, head_dim), value "
            "(B, M, heads, value_dim) and out (B, N, heads, value_dim) with dense channels, got "
            f"{', '.join(str(tuple(t.shape)) for t in (query, key, value, out))}"
        )
    require_dtype(query.dtype, key=key, value=value, out=out)
    require_dtype(torch.int32, rows=rows, key_rows=key_rows, lines=lines, kinds=kinds)
    require_dtype(torch.int64, routes=routes)
    require_dtype(torch.float32, terms=terms)
    if rows is None or terms is None or lines is None:
        return
    own, seen = rows.shape[1], (rows if key_rows is None else key_rows).shape[1]
    wanted = f"({heads}, lines, {LINE}) and (kinds, {-(-own // LINE)}, {seen})"
    if (
        terms.ndim != 3
        or terms.shape[::2] != (heads, LINE)
        or lines.shape[1:] != (-(-own // LINE), seen)
        or (kinds is not None and len(kinds) != len(rows))
        or (key_rows is not None and len(key_rows) != len(rows))
    ):
        raise ValueError(
            f"windows of {own} tokens that see {seen} take terms and lines of {wanted}, and a kind "
            f"and a row of keys each, got {tuple(terms.shape)}, {tuple(lines.shape)}"
        )


@torch.library.impl(_library, "grouped_attention", "CPU")
def _run(
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
) -> None:
    _check(query, key, value, out, rows, key_rows, routes, terms, lines, kinds, scale)
    library, reason = native.load(KERNEL), unsupported(query.device, query.dtype)
    if library is None or reason is not None:
        raise RuntimeError(f"the kernel of attention is not available: {reason}")
    if out.numel() == 0:
        return
    query, key, value = (t if t.stride(3) == 1 else t.contiguous() for t in (query, key, value))
    routes, terms, lines, kinds = (
        None if t is None else t.contiguous() for t in (routes, terms, lines, kinds)
    )
    batch, queries, heads, dim = query.shape
    groups, tokens = (1, queries) if rows is None else rows.shape
    seen = rows if key_rows is None else key_rows
    problem = _problem(
        (batch, groups, heads, tokens, key.shape[1] if seen is None else seen.shape[1]),
        1 if routes is None else routes.shape[2],
        (dim, value.shape[3]),
        tuple(t.stride()[:3] for t in (query, key, value, out)),
        0 if terms is None else terms.shape[1],
        dim**-0.5 if scale is None else scale,
        query.dtype == torch.bfloat16,
        torch.get_num_threads(),
    )
    tensors = {
        **{"query": query, "key": key, "value": value, "output": out},
        **{"rows": rows, "key_rows": key_rows, "regions": routes},
        **{"terms": terms, "lines": lines, "kinds": kinds},
    }
    addresses = Tensors(**{n: t.data_ptr() for n, t in tensors.items() if t is not None})
    if library.attention_forward(ctypes.byref(problem), ctypes.byref(addresses)):
        raise MemoryError("no memory for the scratch of attention")


@functools.lru_cache(maxsize=1024)  # a network has few different ones, and filling them in is slow
def _problem(
    sizes: tuple[int, ...],
    routes: int,
    dims: tuple[int, int],
    strides: tuple[tuple[int, ...], ...],
    term_lines: int,
    scale: float,
    bfloat16: bool,
    threads: int,
) -> Problem:
    batch, groups, heads, queries, region = sizes
    macs = batch * groups * heads * queries * region * routes * sum(dims)
    none = (0, 0, 0), (0, 0, 0)
    return Problem(
        *(*sizes, routes, *dims, *strides, *none, 0, term_lines),
        scale,
        bfloat16,
        1 if macs < SMALL_MACS else threads,
    )
