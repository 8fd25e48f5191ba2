"""Weights of attention with a table, on the CPU for inference (``attention_weights.h``)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ops.cpu.call.binding import kernel
from ops.cpu.call.c_arguments import Call
from ops.cpu.call.dispatch import require_dtype
from ops.cpu.call.tensors import dense_channels
from ops.cpu.threads import MACS, threads_for

__all__ = ["attention_weights"]


@kernel("norm", "attention_weights_forward", large_results=True)
def attention_weights(query: Tensor, key: Tensor, bias: Tensor, half: bool) -> Call:
    """``(query @ key + bias).softmax(-1)``, with float32 sums. No gradients.

    Args:
        query: (B, heads, N, depth), float32 or bfloat16; copied unless its channels are dense.
        key: (B, heads, depth, K) float32; copied unless those of a depth are dense.
        bias: (heads, ..., K), float32 or bfloat16, with N numbers in the axes between.
        half: whether the result is in bfloat16.

    Returns:
        (B, heads, ..., K), contiguous.

    Raises:
        ValueError: other shapes or dtypes, or nothing to multiply.
    """
    fits = query.ndim == key.ndim == 4 and bias.ndim > 1 and key.numel() and query.numel()
    if (
        not fits
        or key.shape[:3] != (*query.shape[:2], query.shape[3])
        or (
            (len(bias), bias.shape[1:-1].numel(), bias.shape[-1])
            != (*query.shape[1:3], key.shape[-1])
        )
    ):
        raise ValueError(
            "query must be (B, heads, N, depth), key (B, heads, depth, K) and bias "
            f"(heads, ..., K), got {tuple(query.shape)}, {tuple(key.shape)} and {tuple(bias.shape)}"
        )
    require_dtype(torch.float32, key=key)
    for name, t in (("query", query), ("bias", bias)):
        if t.dtype != torch.bfloat16:
            require_dtype(torch.float32, **{name: t})
    (batch, heads, queries, depth), keys = query.shape, key.shape[-1]

    def arguments() -> dict[str, Any]:
        rows, columns = dense_channels(query), dense_channels(key)
        return {
            **{"batch": batch, "heads": heads, "queries": queries, "depth": depth, "keys": keys},
            **{"query": rows, "query_stride": rows.stride()[:3]},
            **{"key": columns, "key_stride": columns.stride()[:3]},
            **{"half_query": query.dtype == torch.bfloat16, "half": half},
            "half_bias": bias.dtype == torch.bfloat16,
            "threads": threads_for(query.numel() * keys, MACS),
        }

    dtype = torch.bfloat16 if half else torch.float32
    return Call(query.new_empty((len(query), *bias.shape), dtype=dtype), arguments)
