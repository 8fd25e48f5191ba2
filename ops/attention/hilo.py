"""HiLo attention: some heads attend within small windows, the others to window averages.

Of "Fast Vision Transformers with HiLo Attention", https://arxiv.org/abs/2205.13213.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ops.arguments import checked
from ops.attention.softmax import softmax_attention
from ops.attention.window import window_merge, window_partition

__all__ = [
    "HiLoAttention",
    "HighFrequencyAttention",
    "LowFrequencyAttention",
    "high_frequency_attention",
    "low_frequency_attention",
]


@checked(ranks={"qkv": 4})
def high_frequency_attention(qkv: Tensor, num_heads: int, window_size: int) -> Tensor:
    """Attention of each window to itself.

    Args:
        qkv: (B, H, W, 3·dim), queries, keys and values; sides are multiples of ``window_size``.
        num_heads: divides dim.
        window_size: side of a window.

    Returns:
        (B, H, W, dim).

    Raises:
        ValueError: sides not divisible by ``window_size``, or channels by ``num_heads``.
    """
    _check_heads(qkv.shape[-1], 3, num_heads)
    windows = window_partition(qkv, window_size)
    # (3, B · windows, heads, window_size², head_dim)
    heads = windows.flatten(0, 2).unflatten(2, (3, num_heads, -1)).permute(2, 0, 3, 1, 4)
    query, key, value = heads.unbind(0)
    out = softmax_attention(query, key, value).transpose(1, 2)
    dim = num_heads * out.shape[-1]  # a batch may be empty
    return window_merge(out.reshape(*windows.shape[:4], dim), window_size)


@checked(ranks={"query": 4, "key_value": 4})
def low_frequency_attention(query: Tensor, key_value: Tensor, num_heads: int) -> Tensor:
    """Attention of a map to a coarser one.

    Args:
        query: (B, H, W, dim).
        key_value: (B, h, w, 2·dim), keys and values.
        num_heads: divides dim.

    Returns:
        (B, H, W, dim).

    Raises:
        ValueError: channels not divisible by ``num_heads``.
    """
    _check_heads(query.shape[-1], 1, num_heads)
    _check_heads(key_value.shape[-1], 2, num_heads)
    q = query.flatten(1, 2).unflatten(2, (num_heads, -1)).transpose(1, 2)
    heads = key_value.flatten(1, 2).unflatten(2, (2, num_heads, -1)).permute(2, 0, 3, 1, 4)
    key, value = heads.unbind(0)  # (B, heads, h · w, head_dim)
    out = softmax_attention(q, key, value)
    return out.transpose(1, 2).reshape(query.shape)


def _check_heads(channels: int, parts: int, num_heads: int) -> None:
    if channels % (parts * num_heads):
        raise ValueError(f"num_heads must divide dim {channels / parts:g}, got {num_heads}")


class HighFrequencyAttention(nn.Module):
    """See :func:`high_frequency_attention`: (B, H, W, dim) → (B, H, W, out_dim)."""

    def __init__(self, dim: int, out_dim: int, num_heads: int, window_size: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.window_size = window_size
        self.qkv = nn.Linear(dim, 3 * out_dim)
        self.proj = nn.Linear(out_dim, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(high_frequency_attention(self.qkv(x), self.num_heads, self.window_size))

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, window_size={self.window_size}"


class LowFrequencyAttention(nn.Module):
    """See :func:`low_frequency_attention`: (B, H, W, dim) → (B, H, W, out_dim).

    The coarser map holds the averages of windows.
    """

    def __init__(self, dim: int, out_dim: int, num_heads: int, window_size: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.window_size = window_size
        self.q = nn.Linear(dim, out_dim)
        self.kv = nn.Linear(dim, 2 * out_dim)
        self.proj = nn.Linear(out_dim, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        coarse = x
        if self.window_size > 1:
            coarse = F.avg_pool2d(x.permute(0, 3, 1, 2), self.window_size).permute(0, 2, 3, 1)
        return self.proj(low_frequency_attention(self.q(x), self.kv(coarse), self.num_heads))

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, window_size={self.window_size}"


class HiLoAttention(nn.Module):
    """High- and low-frequency heads in parallel: (B, H, W, dim) → (B, H, W, dim).

    Sides that are not multiples of the window are zero-padded; the padding is not masked.

    Args:
        dim: channels.
        num_heads: total number of heads; divides ``dim``.
        window_size: side of the windows; with 1, all heads attend to all tokens.
        alpha: fraction of the heads (rounded down), and of the channels, for averages.

    Raises:
        ValueError: ``num_heads`` does not divide ``dim``, or ``alpha`` is outside 0 … 1.
    """

    def __init__(self, dim: int, num_heads: int, window_size: int = 2, alpha: float = 0.5) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"num_heads must divide dim {dim}, got {num_heads}")
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha must be in 0 … 1, got {alpha}")
        if window_size < 1:
            raise ValueError(f"window_size must be 1 or more, got {window_size}")
        self.window_size = window_size
        low_heads = int(num_heads * alpha) if window_size > 1 else num_heads
        high_heads = num_heads - low_heads
        head_dim = dim // num_heads
        self.high = (
            HighFrequencyAttention(dim, high_heads * head_dim, high_heads, window_size)
            if high_heads
            else None
        )
        self.low = (
            LowFrequencyAttention(dim, low_heads * head_dim, low_heads, window_size)
            if low_heads
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        x = F.pad(x, (0, 0, 0, -width % self.window_size, 0, -height % self.window_size))
        outs = [branch(x) for branch in (self.high, self.low) if branch is not None]
        return torch.cat(outs, dim=3)[:, :height, :width]
