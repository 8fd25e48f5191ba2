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
def attention_weights(query: Tensor, key: Tensor, weight: Tensor, bias: Tensor, half: bool) -> Call:
    """``(query @ (key @ weight) + bias).softmax(-1)``, with float32 sums. No gradients.

    Args:
        query: (B, heads, N, depth), float32 or bfloat16; copied unless its channels are dense.
        key: (B, heads, depth, P), in the dtype of ``query``.
        weight: (P, K) float32.
        bias: (heads, ..., K), float32 or bfloat16, with N numbers in the axes between.
        half: whether the result is in bfloat16.

    Returns:
        (B, heads, ..., K), contiguous.

    Raises:
        ValueError: other shapes or dtypes, or nothing to multiply.
    """
    fits = query.ndim == key.ndim == 4 and weight.ndim == 2 and bias.ndim > 1
    if (
        not fits
        or not (query.numel() and key.numel() and weight.numel())
        or key.shape != (*query.shape[:2], query.shape[3], len(weight))
        or (
            (len(bias), bias.shape[1:-1].numel(), bias.shape[-1])
            != (*query.shape[1:3], weight.shape[1])
        )
    ):
        shapes = ", ".join(str(tuple(t.shape)) for t in (query, key, weight, bias))
        raise ValueError(
            "query must be (B, heads, N, depth), key (B, heads, depth, P), weight (P, K) and bias "
            f"(heads, ..., K), got {shapes}"
        )
    require_dtype(torch.float32, weight=weight)
    require_dtype(query.dtype, key=key)
    for name, t in (("query", query), ("bias", bias)):
        if t.dtype != torch.bfloat16:
            require_dtype(torch.float32, **{name: t})
    (batch, heads, queries, depth), (places, keys) = query.shape, weight.shape

    def arguments() -> dict[str, Any]:
        rows = dense_channels(query)
        return {
            **{"batch": batch, "heads": heads, "queries": queries, "depth": depth},
            **{"places": places, "keys": keys, "query": rows, "query_stride": rows.stride()[:3]},
            **{"key": key, "key_stride": key.stride(), "half": half},
            **{"half_input": query.dtype == torch.bfloat16},
            "half_bias": bias.dtype == torch.bfloat16,
            "threads": threads_for(query.numel() * keys, MACS),
        }

    dtype = torch.bfloat16 if half else torch.float32
    return Call(query.new_empty((len(query), *bias.shape), dtype=dtype), arguments)
