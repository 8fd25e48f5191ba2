"""Rank-augmented linear attention: keys weighted by the mean query's attention, gated outputs.

Of RAVLT, "Breaking the Low-Rank Dilemma of Linear Attention", https://arxiv.org/abs/2411.07635.
Written from the paper and a specification of what the published model computes.
"""

from __future__ import annotations

import torch
from timm.layers import apply_rot_embed, build_rotary_pos_embed
from torch import Tensor, nn

from ops.arguments import checked, require_shapes
from ops.attention.softmax import softmax_attention
from ops.autocast import autocasts, without_autocast

__all__ = ["RankAugmentedAttention", "rank_augmented_linear_attention", "rotary_table"]

Rotary = tuple[Tensor, Tensor]


@checked()
def rank_augmented_linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rotary: Rotary | None = None,
    *,
    scale: float | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """Linear attention with keys weighted by the mean query's attention to them.

    With φ = ELU + 1, q = φ(query), k = φ(key), w = softmax(scale · mean(q)·kᵀ) over the tokens and
    R the rotation, token t gets ``(R q_t) Σ_s w_s (R k_s)ᵀ v_s / (q_t · Σ_s w_s k_s + eps)``. The
    paper multiplies w by the number of tokens N and averages over them; these factors cancel and
    are omitted, so that no sum grows with N. Everything is computed in float32 (or float64),
    regardless of the input dtype and autocast.

    Args:
        query, key, value: (B, num_heads, N, head_dim).
        rotary: sines and cosines, each (N, head_dim), see :func:`rotary_table`; None for no R.
        scale: of the logits of w; default: head_dim^-0.5.
        eps: added to the denominator.

    Returns:
        (B, num_heads, N, head_dim) in the dtype of ``value``. Time and memory are O(N).

    Raises:
        ValueError: incompatible shapes.
    """
    axes = "batch num_heads tokens head_dim"
    require_shapes(
        query=(query, axes),
        key=(key, axes),
        value=(value, axes),
        **{f"rotary[{i}]": (t, "tokens head_dim") for i, t in enumerate(rotary or ())},
    )
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if autocasts(query.device):
        with without_autocast(query.device):
            return _linear_attention(query, key, value, rotary, scale, eps)
    return _linear_attention(query, key, value, rotary, scale, eps)


def _linear_attention(
    query: Tensor, key: Tensor, value: Tensor, rotary: Rotary | None, scale: float, eps: float
) -> Tensor:
    q, k, v = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (query, key, value))
    q, k = _feature_map(q), _feature_map(k)
    logits = (scale * q.mean(dim=2, keepdim=True)) @ k.transpose(2, 3)  # (B, heads, 1, N)
    k = k * logits.softmax(dim=-1).transpose(2, 3)
    total = q @ k.sum(dim=2).unsqueeze(-1) + eps  # (B, heads, N, 1)
    if rotary is not None:
        q, k = apply_rot_embed(q, *rotary), apply_rot_embed(k, *rotary)
    state = k.transpose(2, 3) @ v  # (B, heads, head_dim, head_dim)
    return (q @ state / total).to(value.dtype)


def _feature_map(x: Tensor) -> Tensor:
    """ELU + 1: x + 1 above 0 and eˣ below.

    ``F.elu`` is avoided because torch.compile expects other strides of its gradient.
    """
    return x.clamp(max=0).exp() + x.relu()


@checked(least={"height": 1, "width": 1})
def rotary_table(
    height: int,
    width: int,
    head_dim: int,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Rotary:
    """2-D rotary embedding: sines and cosines that rotate pairs of channels by row and column.

    Channels (2i, 2i+1) of the first half are rotated by row·ω_i, those of the second half by
    column·ω_i; ω decreases from 1 to 1e-4 in ``head_dim / 4`` geometric steps, both ends included.
    Rows and columns count from 0, whatever the size of the map.

    Returns:
        Two (height·width, head_dim) tables in row-major order, for ``timm.layers.apply_rot_embed``;
        float64 if ``dtype`` is float64, else float32.

    Raises:
        ValueError: ``head_dim`` is not a multiple of 4.
    """
    if head_dim < 4 or head_dim % 4:
        raise ValueError(f"head_dim must be a multiple of 4, got {head_dim}")
    dtype = torch.promote_types(dtype, torch.float32)
    exponents = torch.linspace(0, 1, head_dim // 4, device=device, dtype=dtype)
    sin, cos = build_rotary_pos_embed(
        [height, width], bands=10000.0**-exponents, in_pixels=False, device=device, dtype=dtype
    )
    return sin, cos


class RankAugmentedAttention(nn.Module):
    """:func:`rank_augmented_linear_attention` with a depthwise 5×5 term and a gate.

    (B, H, W, dim) → (B, H, W, dim), any H and W. One projection computes query, key, value and
    gate; a depthwise convolution of the values is added to the attention's output, and the sum is
    multiplied by the gate.

    Args:
        dim: channels.
        num_heads: divides ``dim`` into heads whose width is a multiple of 4.
        linear: False uses softmax attention of the rotated query and key instead of linear
            attention, as the deeper stages of RAVLT do.

    Raises:
        ValueError: ``dim`` is not a multiple of 4 · ``num_heads``.
    """

    def __init__(self, dim: int, num_heads: int, *, linear: bool = True) -> None:
        super().__init__()
        if num_heads < 1 or dim % (4 * num_heads):
            raise ValueError(f"dim {dim} must be a multiple of 4 · num_heads, got {num_heads}")
        self.num_heads = num_heads
        self.linear = linear
        self.qkvo = nn.Linear(dim, 4 * dim)
        self.lepe = nn.Conv2d(dim, dim, 5, padding=2, groups=dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, rotary: Rotary | None = None) -> Tensor:
        """``rotary``: the :func:`rotary_table` of the map, if it has been computed already."""
        height, width, dim = x.shape[1:]
        if rotary is None:
            head_dim = dim // self.num_heads
            rotary = rotary_table(height, width, head_dim, device=x.device, dtype=x.dtype)
        *qkv, gate = self.qkvo(x).chunk(4, dim=-1)
        query, key, value = (
            t.flatten(1, 2).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in qkv
        )  # (B, heads, HW, head_dim)
        if self.linear:
            out = rank_augmented_linear_attention(query, key, value, rotary)
        else:
            query, key = (apply_rot_embed(t, *rotary) for t in (query, key))
            out = softmax_attention(query, key, value)
        out = out.transpose(1, 2).reshape(x.shape)
        out = out + self.lepe(qkv[2].permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.proj(out * gate)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, linear={self.linear}"
