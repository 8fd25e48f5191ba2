"""Single-head self-attention on a part of the channels, of SHViT.

https://arxiv.org/abs/2401.16456
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ops.arguments import checked
from ops.conv import ConvNorm

__all__ = ["SingleHeadAttention", "single_head_attention"]


@checked(ranks={"query": 4, "key": 4, "value": 4})
def single_head_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention of one head over all positions of a map.

    Args:
        query, key: (B, qk_dim, H, W).
        value: (B, dim, H, W).

    Returns:
        (B, dim, H, W): softmax(q·kᵀ / √qk_dim)·v.
    """
    q, k, v = (t.flatten(2) for t in (query, key, value))  # (B, width, HW)
    if query.is_cpu:
        # torch has no fused kernel for queries narrower than values, so two plain matrix products
        # are faster.
        logits = (q.shape[1] ** -0.5 * q).transpose(1, 2) @ k
        return (v @ logits.softmax(dim=-1).transpose(1, 2)).reshape(value.shape)
    q, k, v = (t.transpose(1, 2).unsqueeze(1) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v)  # (B, 1, HW, dim)
    return out.squeeze(1).transpose(1, 2).reshape(value.shape)


class SingleHeadAttention(nn.Module):
    """:func:`single_head_attention` on the first ``attn_dim`` channels; the others bypass it.

    (B, dim, H, W) → (B, dim, H, W). The attended channels are normalised first; a ReLU and a
    projection over all channels follow.

    Args:
        dim: channels of the map.
        attn_dim: number of attended channels.
        qk_dim: width of query and key.

    Raises:
        ValueError: ``attn_dim`` is outside 1 … ``dim``.
    """

    def __init__(self, dim: int, attn_dim: int, qk_dim: int = 16) -> None:
        super().__init__()
        if not 0 < attn_dim <= dim:
            raise ValueError(f"attn_dim must be in 1 … {dim} (dim), got {attn_dim}")
        self.qkv_splits = (qk_dim, qk_dim, attn_dim)
        self.input_splits = (attn_dim, dim - attn_dim)
        self.norm = nn.GroupNorm(1, attn_dim)
        self.qkv = ConvNorm(attn_dim, sum(self.qkv_splits))
        self.act = nn.ReLU()
        self.proj = ConvNorm(dim, dim, norm_scale=0.0)

    def forward(self, x: Tensor) -> Tensor:
        attended, rest = x.split(self.input_splits, dim=1)
        query, key, value = self.qkv(self.norm(attended)).split(self.qkv_splits, dim=1)
        attended = single_head_attention(query, key, value)
        return self.proj(self.act(torch.cat((attended, rest), dim=1)))
