"""Rank-augmented linear attention on the CPU in few passes, see :mod:`ops.attention`.

The kernel (``linear_attention.h``) takes queries, keys, values and gates where one projection left
them, and computes in float32.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ops.attention.rank_augmented import rotary_table
from ops.cpu.binding import Addresses, Call, kernel
from ops.cpu.structures import structure
from ops.cpu.threads import VALUES, threads_for

__all__ = ["check_gated", "gated_linear_attention", "turns", "unsupported", "unsupported_heads"]

_EPS = 1e-6
_WHOLE = 32  # of the channels of a head: two vectors of the widest instruction set

_PROBLEM = structure("attention/linear_attention.h", "linear_attention::Problem")
_TENSORS = structure("attention/linear_attention.h", "linear_attention::Tensors")


def unsupported(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """``None`` if the kernel takes such tensors, else the reason in words.

    The first call on a machine compiles the kernel, which takes some seconds.
    """
    return unsupported_heads(head_dim) or gated_linear_attention.unsupported(device, dtype)


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


@kernel("linear_attention", "linear_attention_forward")
def gated_linear_attention(qkvo: Tensor, bias: Tensor, num_heads: int) -> Call:
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
    check_gated(qkvo, bias, num_heads)
    batch, height, width, dim = bias.shape
    head_dim = dim // num_heads
    reason = unsupported_heads(head_dim)
    if reason is not None:
        raise RuntimeError(reason)
    out = torch.empty_like(bias, memory_format=torch.contiguous_format)

    def arguments() -> Any:
        problem = _problem(
            (batch, num_heads, height, width, head_dim),
            qkvo.dtype == torch.bfloat16,
            torch.get_num_threads(),
        )
        step = dim * qkvo.element_size()
        parts = {name: (qkvo, i * step) for i, name in enumerate(("query", "key", "value", "gate"))}
        tensors = {
            **{"bias": bias.contiguous(), "out": out},
            **{"row_table": turns(height, head_dim, 0), "column_table": turns(width, head_dim, 1)},
        }
        return problem, Addresses(_TENSORS, {**parts, **tensors})

    return Call(out, arguments)


@functools.lru_cache(maxsize=32)
def turns(size: int, head_dim: int, axis: int) -> Tensor:
    """(size, head_dim): cosines, then sines, negated for even channels, of rows or columns."""
    shape = (size, 1) if axis == 0 else (1, size)
    cpu = torch.device("cpu")  # whatever the default device is
    sin, cos = (t.chunk(2, dim=1)[axis] for t in rotary_table(*shape, head_dim, device=cpu))
    signs = sin.new_tensor([-1.0, 1.0]).repeat(head_dim // 4)
    return torch.cat((cos, sin * signs), dim=1)


@functools.lru_cache(maxsize=1024)  # a network has few different ones, and filling them in is slow
def _problem(sizes: tuple[int, ...], bfloat16: bool, threads: int) -> Any:
    batch, heads, height, width, head_dim = sizes
    dim, tokens = heads * head_dim, height * width
    strides = tokens * dim, dim, head_dim
    return _PROBLEM(
        batch=batch,
        heads=heads,
        height=height,
        width=width,
        dim=head_dim,
        stride=(4 * tokens * dim, 4 * dim, head_dim),
        bias_stride=strides,
        out_stride=strides,
        scale=head_dim**-0.5,
        eps=_EPS,
        bfloat16=bfloat16,
        threads=threads_for(batch * tokens * dim, VALUES, threads),
    )
