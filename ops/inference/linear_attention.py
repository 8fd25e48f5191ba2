"""Rank-augmented linear attention on the CPU in few passes, see :mod:`ops.attention`.

The kernel (``ops/native/linear_attention.cpp``) takes queries, keys, values and gates where one
projection left them, in float32 or bfloat16, and computes in float32. There are no gradients.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from ops import native
from ops.attention.rank_augmented import rotary_table
from ops.native.eager import is_plain_call, unsupported_tensors
from ops.native.threads import VALUES, threads_for

__all__ = ["check_gated", "gated_linear_attention", "turns", "unsupported", "unsupported_heads"]

_KERNEL = "linear_attention"
_EPS = 1e-6
_WHOLE = 32  # of the channels of a head: two vectors of the widest instruction set


class _Problem(ctypes.Structure):
    """``linear_attention::Problem`` of ops/native/linear_attention.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "heads", "height", "width", "dim")),
        *((name, ctypes.c_int64 * 3) for name in ("stride", "bias_stride", "out_stride")),
        *((name, ctypes.c_double) for name in ("scale", "eps")),
        *((name, ctypes.c_int64) for name in ("bfloat16", "threads")),
    ]


class _Tensors(ctypes.Structure):
    """``linear_attention::Tensors`` of ops/native/linear_attention.h."""

    _fields_ = [
        (name, ctypes.c_void_p)
        for name in (
            *("query", "key", "value", "gate", "bias", "row_table", "column_table", "output"),
        )
    ]


def unsupported(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """``None`` if the kernel takes such tensors, else the reason in words.

    The first call on a machine compiles the kernel, which takes some seconds.
    """
    return unsupported_heads(head_dim) or unsupported_tensors(_KERNEL, device, dtype)


def unsupported_heads(head_dim: int) -> str | None:
    """``None`` if kernels rotate heads of so many channels, else the reason in words."""
    if head_dim % _WHOLE:
        return f"the kernel takes head dims that {_WHOLE} divides, not {head_dim}"
    return None


def check_gated(qkvo: Tensor, bias: Tensor, num_heads: int) -> None:
    """Refuse tensors that :func:`gated_linear_attention` cannot take.

    Raises:
        ValueError: shapes or dtypes that do not go together.
    """
    dim = bias.shape[-1]
    expected = (*bias.shape[:-1], 4 * dim)
    if bias.ndim != 4 or qkvo.shape != expected or not qkvo.is_contiguous():
        raise ValueError(f"qkvo must be contiguous and {expected}, got {tuple(qkvo.shape)}")
    if bias.dtype != qkvo.dtype or dim % num_heads:
        raise ValueError(
            f"bias must be {qkvo.dtype} and {num_heads} heads divide its {dim} channels, "
            f"got {bias.dtype}"
        )


def gated_linear_attention(qkvo: Tensor, bias: Tensor, num_heads: int) -> Tensor:
    """``(rank_augmented_linear_attention(q, k, v, rotations of the map) + bias) * gate``.

    Args:
        qkvo: (B, H, W, 4·dim), contiguous: queries, keys, values and gates.
        bias: (B, H, W, dim).
        num_heads: divides dim, into heads that :func:`unsupported` does not refuse.

    Returns:
        (B, H, W, dim), contiguous.

    Raises:
        ValueError: shapes or dtypes that do not go together.
        RuntimeError: the kernel is not available here.
    """
    if is_plain_call((qkvo, bias)):
        return _run(qkvo, bias, num_heads)
    return torch.ops.vision_backbones.gated_linear_attention.default(qkvo, bias, num_heads)


_library = torch.library.Library("vision_backbones", "FRAGMENT")
_library.define("gated_linear_attention(Tensor qkvo, Tensor bias, int num_heads) -> Tensor")


@torch.library.register_fake("vision_backbones::gated_linear_attention", lib=_library)
def _empty_output(qkvo: Tensor, bias: Tensor, num_heads: int) -> Tensor:
    return qkvo.new_empty(bias.shape)


@torch.library.impl(_library, "gated_linear_attention", "CPU")
def _run(qkvo: Tensor, bias: Tensor, num_heads: int) -> Tensor:
    check_gated(qkvo, bias, num_heads)
    batch, height, width, dim = bias.shape
    head_dim = dim // num_heads
    library, reason = native.load(_KERNEL), unsupported(qkvo.device, qkvo.dtype, head_dim)
    if library is None or reason is not None:
        raise RuntimeError(f"the kernel of linear attention is not available: {reason}")
    out = torch.empty_like(bias, memory_format=torch.contiguous_format)
    if out.numel() == 0:
        return out
    bias = bias.contiguous()
    problem = _problem(
        (batch, num_heads, height, width, head_dim),
        qkvo.dtype == torch.bfloat16,
        torch.get_num_threads(),
    )
    rows, columns = turns(height, head_dim, 0), turns(width, head_dim, 1)
    start, step = qkvo.data_ptr(), dim * qkvo.element_size()
    addresses: Any = _Tensors(
        *(start + i * step for i in range(4)),
        *(t.data_ptr() for t in (bias, rows, columns, out)),
    )
    if library.linear_attention_forward(ctypes.byref(problem), ctypes.byref(addresses)):
        raise MemoryError("no memory for the scratch of linear attention")
    return out


@functools.lru_cache(maxsize=32)
def turns(size: int, head_dim: int, axis: int) -> Tensor:
    """(size, head_dim): cosines, then sines, negated for even channels, of rows or columns."""
    shape = (size, 1) if axis == 0 else (1, size)
    sin, cos = (t.chunk(2, dim=1)[axis] for t in rotary_table(*shape, head_dim))
    signs = torch.tensor([-1.0, 1.0]).repeat(head_dim // 4)
    return torch.cat((cos, sin * signs), dim=1)


@functools.lru_cache(maxsize=1024)  # a network has few different ones, and filling them in is slow
def _problem(sizes: tuple[int, ...], bfloat16: bool, threads: int) -> _Problem:
    batch, heads, height, width, head_dim = sizes
    dim, tokens = heads * head_dim, height * width
    strides = tokens * dim, dim, head_dim
    return _Problem(
        *sizes,
        (4 * tokens * dim, 4 * dim, head_dim),
        strides,
        strides,
        head_dim**-0.5,
        _EPS,
        bfloat16,
        threads_for(batch * tokens * dim, VALUES, threads),
    )
