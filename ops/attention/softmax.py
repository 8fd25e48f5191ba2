"""Softmax attention by torch's fused kernels, in which NaN stays NaN."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["softmax_attention"]

# The widest vector register that torch has kernels for holds as many numbers.
_LANES = 16


def softmax_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float | None = None
) -> Tensor:
    """softmax(query · keyᵀ · scale) · value.

    torch's kernel for CPUs finds the greatest score of a row without regard to NaN where the row
    does not fill a vector register. A row of nothing but NaN then looks to it as one that is masked
    as a whole does, and comes out as 0: weights that diverged give numbers that look right. With a
    mask, even one that hides nothing, it does not.

    Args:
        query: (B, heads, N, head_dim).
        key: (B, heads, M, head_dim).
        value: (B, heads, M, value_dim).
        scale: factor on the products; 1 / √head_dim by default.

    Returns:
        (B, heads, N, value_dim).
    """
    # A number of keys may be symbolic for compilers and tracers: they take torch as it is.
    seen = not (torch.compiler.is_compiling() or torch.jit.is_tracing())
    mask = query.new_zeros(1, 1) if seen and query.is_cpu and key.shape[-2] < _LANES else None
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
