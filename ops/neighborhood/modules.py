"""Neighborhood attention as a layer, with the projections around it and NATTEN's constructor.

https://arxiv.org/abs/2204.07143.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from ops.init import trunc_normal
from ops.neighborhood._checks import per_axis_bool, per_axis_int
from ops.neighborhood.functional import na1d, na2d, na3d

__all__ = ["NeighborhoodAttention1D", "NeighborhoodAttention2D", "NeighborhoodAttention3D"]


class _NeighborhoodAttention(nn.Module):
    """What the layers of all ranks share."""

    rank: ClassVar[int]

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        dilation: int | Sequence[int] = 1,
        is_causal: bool | Sequence[bool] = False,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        proj_drop: float = 0.0,
        rel_pos_bias: bool = False,
    ) -> None:
        super().__init__()
        if num_heads < 1 or embed_dim % num_heads != 0:
            raise ValueError(
                f"num_heads must divide embed_dim, got {num_heads} heads for {embed_dim} channels"
            )
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.kernel_size = per_axis_int("kernel_size", kernel_size, self.rank)
        self.stride = per_axis_int("stride", stride, self.rank)
        self.dilation = per_axis_int("dilation", dilation, self.rank)
        self.is_causal = per_axis_bool("is_causal", is_causal, self.rank)
        if any(s > k for s, k in zip(self.stride, self.kernel_size, strict=True)):
            raise ValueError(
                f"stride must not exceed kernel_size, got {self.stride} > {self.kernel_size}"
            )
        self.scale = (embed_dim // num_heads) ** -0.5 if qk_scale is None else qk_scale
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim, bias=qkv_bias)
        self.rpb: nn.Parameter | None = None
        if rel_pos_bias:
            self.rpb = nn.Parameter(torch.empty(num_heads, *(2 * k - 1 for k in self.kernel_size)))
            trunc_normal(self.rpb)
        self.proj = nn.Linear(embed_dim, embed_dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != self.rank + 2 or x.shape[-1] != self.embed_dim:
            raise ValueError(
                f"x must have a batch, {self.rank} axes and {self.embed_dim} channels last, got "
                f"{tuple(x.shape)}"
            )
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # (B, *S, 3, H, D)
        query, key, value = qkv.unbind(dim=-3)
        attention = (na1d, na2d, na3d)[self.rank - 1]
        out = attention(
            query,
            key,
            value,
            kernel_size=self.kernel_size,
            stride=self.stride,
            dilation=self.dilation,
            is_causal=self.is_causal,
            scale=self.scale,
            rpb=self.rpb,
        )
        assert isinstance(out, Tensor)
        return self.proj_drop(self.proj(out.flatten(-2)))

    def extra_repr(self) -> str:
        return (
            f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, "
            f"kernel_size={self.kernel_size}, stride={self.stride}, dilation={self.dilation}, "
            f"is_causal={self.is_causal}, scale={self.scale:.4g}, "
            f"rel_pos_bias={self.rpb is not None}"
        )


class NeighborhoodAttention1D(_NeighborhoodAttention):
    """See :func:`ops.neighborhood.na1d`; between a projection to query, key, value and one back.

    (B, L, embed_dim) → (B, L, embed_dim). Parameters are named as NATTEN's: ``qkv``, ``proj``, and
    ``rpb`` as in NAT.

    Args:
        embed_dim: channels.
        num_heads: heads; divides ``embed_dim``.
        kernel_size, stride, dilation, is_causal: as :func:`ops.neighborhood.na1d`.
        qkv_bias: bias of the first projection.
        qk_scale: default (embed_dim / num_heads) ** -0.5.
        proj_drop: dropout after the last projection.
        rel_pos_bias: learn a bias for every head and relative position.

    Raises:
        ValueError: parameters that :func:`ops.neighborhood.na1d` refuses, heads that do not divide
            the channels; in the call, an input of the wrong shape or smaller than the window.
    """

    rank = 1


class NeighborhoodAttention2D(_NeighborhoodAttention):
    """See :func:`ops.neighborhood.na2d`: (B, H, W, embed_dim) → (B, H, W, embed_dim).

    Arguments and errors as :class:`NeighborhoodAttention1D`.
    """

    rank = 2


class NeighborhoodAttention3D(_NeighborhoodAttention):
    """See :func:`ops.neighborhood.na3d`: (B, T, H, W, embed_dim) → (B, T, H, W, embed_dim).

    Arguments and errors as :class:`NeighborhoodAttention1D`.
    """

    rank = 3
