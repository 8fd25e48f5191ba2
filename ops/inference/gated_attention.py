"""Rotated softmax attention on the CPU with a bias and a gate, in one pass, without gradients.

The kernel is that of :mod:`ops.inference.grouped_attention`.
"""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from ops import native
from ops.inference.grouped_attention import KERNEL, SMALL_MACS, Problem, Tensors
from ops.inference.linear_attention import check_gated, turns, unsupported_heads
from ops.native.eager import is_plain_call, unsupported_tensors

__all__ = ["gated_attention", "unsupported"]


def unsupported(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """``None`` if the kernel takes such tensors, else the reason in words.

    The first call on a machine compiles the kernel, which takes some seconds.
    """
    return unsupported_heads(head_dim) or unsupported_tensors(KERNEL, device, dtype)


def gated_attention(qkvo: Tensor, bias: Tensor, num_heads: int) -> Tensor:
    """``(softmax attention of queries and keys rotated by the map + bias) * gate``.

    Args, Returns, Raises: as of :func:`ops.inference.linear_attention.gated_linear_attention`;
    see also :func:`ops.attention.rank_augmented.rotary_table`.
    """
    if is_plain_call((qkvo, bias)):
        return _run(qkvo, bias, num_heads)
    return torch.ops.vision_backbones.gated_attention.default(qkvo, bias, num_heads)


_library = torch.library.Library("vision_backbones", "FRAGMENT")
_library.define("gated_attention(Tensor qkvo, Tensor bias, int num_heads) -> Tensor")


@torch.library.register_fake("vision_backbones::gated_attention", lib=_library)
def _empty_output(qkvo: Tensor, bias: Tensor, num_heads: int) -> Tensor:
    return qkvo.new_empty(bias.shape)


@torch.library.impl(_library, "gated_attention", "CPU")
def _run(qkvo: Tensor, bias: Tensor, num_heads: int) -> Tensor:
    check_gated(qkvo, bias, num_heads)
    batch, height, width, dim = bias.shape
    head_dim = dim // num_heads
    library, reason = native.load(KERNEL), unsupported(qkvo.device, qkvo.dtype, head_dim)
    if library is None or reason is not None:
        raise RuntimeError(f"the kernel of attention is not available: {reason}")
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
    query, key, value, gate = (start + i * step for i in range(4))
    addresses = Tensors(
        query=query,
        key=key,
        value=value,
        row_table=rows.data_ptr(),
        column_table=columns.data_ptr(),
        bias=bias.data_ptr(),
        gate=gate,
        output=out.data_ptr(),
    )
    if library.attention_forward(ctypes.byref(problem), ctypes.byref(addresses)):
        raise MemoryError("no memory for the scratch of attention")
    return out


@functools.lru_cache(maxsize=1024)  # a network has few different ones, and filling them in is slow
def _problem(sizes: tuple[int, ...], bfloat16: bool, threads: int) -> Problem:
    batch, heads, height, width, head_dim = sizes
    dim, tokens = heads * head_dim, height * width
    whole, projected = (tokens * dim, dim, head_dim), (4 * tokens * dim, 4 * dim, head_dim)
    macs = batch * tokens * tokens * 2 * dim
    return Problem(
        *(batch, 1, heads, tokens, tokens, 1, head_dim, head_dim),
        *(projected, projected, projected, whole, whole, projected),
        *(width, 0),
        head_dim**-0.5,
        bfloat16,
        1 if macs < SMALL_MACS else threads,
    )
