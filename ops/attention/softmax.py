"""Softmax attention with torch's fused kernels that propagates NaN."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# float32 lanes of the widest vector register that torch's kernels use.
_LANES = 16


def softmax_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float | None = None
) -> Tensor:
    """softmax(query · keyᵀ · scale) · value.

    torch's CPU kernel ignores NaN when it computes the maximum of a row that does not fill a vector
    register. A row of NaN is then treated like a fully masked row and yields 0, so diverged weights
    give plausible numbers. Passing a mask, even one that masks nothing, avoids this.

    Args:
        query: (B, heads, N, head_dim).
        key: (B, heads, M, head_dim).
        value: (B, heads, M, value_dim).
        scale: factor on the products; 1 / √head_dim by default.

    Returns:
        (B, heads, N, value_dim).
    """
    # Compilers and tracers may see a symbolic number of keys, so they get no mask.
    seen = not (torch.compiler.is_compiling() or torch.jit.is_tracing())
    mask = query.new_zeros(1, 1) if seen and query.is_cpu and key.shape[-2] < _LANES else None
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
