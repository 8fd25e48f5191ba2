"""Softmax attention on the CPU to few keys, of tokens where they lie, without gradients.

The kernel (``ops/native/attention.cpp``) is for what torch's is slow at: narrow heads, few keys,
and regions that would have to be gathered. It takes float32 or bfloat16 and computes in float32.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from ops import native
from ops.native.eager import is_plain_call, require_dtype, unsupported_tensors

__all__ = [
    "KERNEL",
    "SMALL_MACS",
    "Problem",
    "Tensors",
    "attend",
    "attend_regions",
    "unsupported",
]

KERNEL = "attention"
SMALL_MACS = 2e6  # below it one thread is quicker than waking others


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
        ("width", ctypes.c_int64),
        ("scale", ctypes.c_double),
        *((name, ctypes.c_int64) for name in ("bfloat16", "threads")),
    ]


class Tensors(ctypes.Structure):
    """``attention::Tensors`` of ops/native/attention.h."""

    _fields_ = [
        (name, ctypes.c_void_p)
        for name in (
            *("query", "key", "value", "rows", "regions", "row_table", "column_table"),
            *("bias", "gate", "output"),
        )
    ]


def unsupported(device: torch.device, dtype: torch.dtype) -> str | None:
    """``None`` if the kernel takes such tensors, else the reason in words.

    The first call on a machine compiles the kernel, which takes some seconds.
    """
    return unsupported_tensors(KERNEL, device, dtype)


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
    _attend(query, key, value, None, None, scale, out)


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
    if rows.numel() != query.shape[1]:
        raise ValueError(
            f"rows must share out {query.shape[1]} tokens to regions, got {tuple(rows.shape)}"
        )
    if out is None:
        out = value.new_empty(*query.shape[:3], value.shape[3])
    _attend(query, key, value, rows, routes, scale, out)
    return out


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows: Tensor | None,
    routes: Tensor | None,
    scale: float | None,
    out: Tensor,
) -> None:
    inputs: tuple[Any, ...] = (query, key, value, rows, routes, scale, out)
    if is_plain_call((query, key, value, rows, routes, out)):
        _run(*inputs)
    else:
        torch.ops.vision_backbones.grouped_attention.default(*inputs)


_library = torch.library.Library("vision_backbones", "FRAGMENT")
_library.define(
    "grouped_attention(Tensor query, Tensor key, Tensor value, Tensor? rows, Tensor? routes, "
    "float? scale, Tensor(a!) out) -> ()"
)


@torch.library.register_fake("vision_backbones::grouped_attention", lib=_library)
def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows: Tensor | None,
    routes: Tensor | None,
    scale: float | None,
    out: Tensor,
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
    require_dtype(torch.int32, rows=rows)
    require_dtype(torch.int64, routes=routes)


@torch.library.impl(_library, "grouped_attention", "CPU")
def _run(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows: Tensor | None,
    routes: Tensor | None,
    scale: float | None,
    out: Tensor,
) -> None:
    _check(query, key, value, rows, routes, scale, out)
    library, reason = native.load(KERNEL), unsupported(query.device, query.dtype)
    if library is None or reason is not None:
        raise RuntimeError(f"the kernel of attention is not available: {reason}")
    if out.numel() == 0:
        return
    query, key, value = (t if t.stride(3) == 1 else t.contiguous() for t in (query, key, value))
    routes = None if routes is None else routes.contiguous()
    batch, queries, heads, dim = query.shape
    groups, region = (1, key.shape[1]) if rows is None else rows.shape
    problem = _problem(
        (batch, groups, heads, queries if rows is None else region, region),
        1 if routes is None else routes.shape[2],
        (dim, value.shape[3]),
        tuple(t.stride()[:3] for t in (query, key, value, out)),
        dim**-0.5 if scale is None else scale,
        query.dtype == torch.bfloat16,
        torch.get_num_threads(),
    )
    tensors = (query, key, value, rows, routes, None, None, None, None, out)
    addresses = Tensors(*(None if t is None else t.data_ptr() for t in tensors))
    if library.attention_forward(ctypes.byref(problem), ctypes.byref(addresses)):
        raise MemoryError("no memory for the scratch of attention")


@functools.lru_cache(maxsize=1024)  # a network has few different ones, and filling them in is slow
def _problem(
    sizes: tuple[int, ...],
    routes: int,
    dims: tuple[int, int],
    strides: tuple[tuple[int, ...], ...],
    scale: float,
    bfloat16: bool,
    threads: int,
) -> Problem:
    batch, groups, heads, queries, region = sizes
    macs = batch * groups * heads * queries * region * routes * sum(dims)
    none = (0, 0, 0), (0, 0, 0)
    return Problem(
        *(*sizes, routes, *dims, *strides, *none, 0),
        scale,
        bfloat16,
        1 if macs < SMALL_MACS else threads,
    )
