"""Rotated softmax attention on the CPU with a bias and a gate, in one pass.

The kernel is that of :mod:`ops.cpu.attention.grouped`.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ops.cpu.attention.grouped import PROBLEM, SMALL_MACS, TENSORS
from ops.cpu.attention.linear import check_gated, turns, unsupported_heads
from ops.cpu.binding import Addresses, Call, kernel

__all__ = ["gated_attention", "unsupported"]


def unsupported(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """``None`` if the kernel takes such tensors, else the reason in words.

    The first call on a machine compiles the kernel, which takes some seconds.
    """
    return unsupported_heads(head_dim) or gated_attention.unsupported(device, dtype)


@kernel("attention", "attention_forward")
def gated_attention(qkvo: Tensor, bias: Tensor, num_heads: int) -> Call:
    """``(softmax attention of queries and keys rotated by the map + bias) * gate``.

    Args, Returns, Raises: as of :func:`ops.cpu.attention.linear.gated_linear_attention`;
    see also :func:`ops.attention.rank_augmented.rotary_table`.
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
        return problem, Addresses(TENSORS, {**parts, **tensors})

    return Call(out, arguments)


@functools.lru_cache(maxsize=1024)  # a network has few different ones, and filling them in is slow
def _problem(sizes: tuple[int, ...], bfloat16: bool, threads: int) -> Any:
    batch, heads, height, width, head_dim = sizes
    dim, tokens = heads * head_dim, height * width
    whole, projected = (tokens * dim, dim, head_dim), (4 * tokens * dim, 4 * dim, head_dim)
    macs = batch * tokens * tokens * 2 * dim
    return PROBLEM(
        batch=batch,
        groups=1,
        heads=heads,
        queries=tokens,
        region_keys=tokens,
        routes=1,
        dim=head_dim,
        value_dim=head_dim,
        query_stride=projected,
        key_stride=projected,
        value_stride=projected,
        out_stride=whole,
        bias_stride=whole,
        gate_stride=projected,
        width=width,
        scale=head_dim**-0.5,
        bfloat16=bfloat16,
        threads=1 if macs < SMALL_MACS else threads,
    )
