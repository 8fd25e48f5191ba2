"""Neighborhood attention layers with input and output projections and NATTEN's constructor.

https://arxiv.org/abs/2204.07143.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from ops.init import trunc_normal
from ops.neighborhood._checks import per_axis_bool, per_axis_int
from ops.neighborhood._geometry import Inputs, NAParams
from ops.neighborhood.functional import BACKENDS, na1d, na2d, na3d
from ops.sizes import larger, smaller

_Sizes = tuple[int, ...]
_SMALL_MAPS = ("refuse", "shrink", "pad")


class _NeighborhoodAttention(nn.Module):
    """Base class of the layers of all ranks."""

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
        small_maps: str = "refuse",
    ) -> None:
        super().__init__()
        if small_maps not in _SMALL_MAPS:
            raise ValueError(
                f"small_maps must be one of {', '.join(_SMALL_MAPS)}, got {small_maps!r}"
            )
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
        self.small_maps = small_maps
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
        size = x.shape[1:-1]
        qkv = self.qkv(x)
        padded = self.pad(qkv)
        out = self.attend(padded)
        if padded is not qkv:
            for axis, length in enumerate(size, 1):
                out = out.narrow(axis, 0, length)
        return self.proj_drop(self.proj(out))

    def pad(self, qkv: Tensor) -> Tensor:
        """``qkv`` (B, *S, 3 · embed_dim), continued at the end of the axes that need it.

        The rest is what the projection makes of zeros: its bias.
        """
        if self.small_maps != "pad":
            return qkv
        fill = qkv.new_zeros(1) if self.qkv.bias is None else self.qkv.bias.to(qkv.dtype)
        axes = zip(qkv.shape[1:-1], self.kernel_size, self.dilation, strict=True)
        for axis, (n, k, d) in enumerate(axes, 1):
            missing = larger(k * d - n, 0)
            if not (isinstance(missing, int) and missing == 0):
                shape = (*qkv.shape[:axis], missing, *qkv.shape[axis + 1 :])
                qkv = torch.cat((qkv, fill.expand(shape)), axis)
        return qkv

    def attend(self, qkv: Tensor) -> Tensor:
        """The attention without projections: (B, *S, 3 · embed_dim) → (B, *S, embed_dim)."""
        query, key, value = qkv.unflatten(-1, (3, self.num_heads, -1)).unbind(dim=-3)
        kernel_size, stride, dilation, rpb = self.window(query.shape[1:-2])
        if all(isinstance(k, int) for k in kernel_size):
            attention = (na1d, na2d, na3d)[self.rank - 1]
            out = attention(
                query,
                key,
                value,
                kernel_size=kernel_size,
                stride=stride,
                dilation=dilation,
                is_causal=self.is_causal,
                scale=self.scale,
                rpb=rpb,
            )
            assert isinstance(out, Tensor)
        else:  # a window that depends on symbolic sizes, which the function would specialise
            params = NAParams(kernel_size, stride, dilation, self.is_causal, self.scale, False)
            out, _ = BACKENDS["reference"].attend(Inputs(query, key, value, rpb=rpb), params)
        return out.flatten(-2)

    def window(self, size: Sequence[int]) -> tuple[_Sizes, _Sizes, _Sizes, Tensor | None]:
        """Kernel size, stride, dilation and position bias for a map of ``size``."""
        if self.small_maps != "shrink":
            return self.kernel_size, self.stride, self.dilation, self.rpb
        kernel_size, dilation = [], []
        rpb: Tensor | None = self.rpb
        for axis, (n, k, d) in enumerate(zip(size, self.kernel_size, self.dilation, strict=True)):
            fitted = smaller(k, n)
            kernel_size.append(fitted)
            dilation.append(1 if d == 1 else smaller(d, n // fitted))
            if rpb is not None:  # a table of offsets around its centre
                rpb = rpb.narrow(axis + 1, k - fitted, 2 * fitted - 1)
        stride = tuple(
            1 if s == 1 else smaller(s, k) for s, k in zip(self.stride, kernel_size, strict=True)
        )
        return tuple(kernel_size), stride, tuple(dilation), rpb

    def extra_repr(self) -> str:
        return (
            f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, "
            f"kernel_size={self.kernel_size}, stride={self.stride}, dilation={self.dilation}, "
            f"is_causal={self.is_causal}, scale={self.scale:.4g}, "
            f"rel_pos_bias={self.rpb is not None}, small_maps={self.small_maps!r}"
        )


class NeighborhoodAttention1D(_NeighborhoodAttention):
    """:func:`ops.neighborhood.na1d` with projections to query, key and value, and of the output.

    (B, L, embed_dim) → (B, L, embed_dim). Parameters are named as in NATTEN (``qkv``, ``proj``) and
    NAT (``rpb``).

    Args:
        embed_dim: channels.
        num_heads: heads; divides ``embed_dim``.
        kernel_size, stride, dilation, is_causal: as in :func:`ops.neighborhood.na1d`.
        qkv_bias: bias of the first projection.
        qk_scale: default: (embed_dim / num_heads) ** -0.5.
        proj_drop: dropout after the last projection.
        rel_pos_bias: learn a bias for every head and relative position.
        small_maps: behaviour on an axis shorter than kernel_size · dilation.
            ``"refuse"`` raises an error. ``"shrink"`` reduces the dilation, then the window, until
            it covers the whole axis, and uses the central part of the position bias. ``"pad"``
            acts like zeros at the end before the first projection, and crops before the last one;
            padded tokens are not masked, as in NATTEN up to 0.14.

    Raises:
        ValueError: invalid arguments of :func:`ops.neighborhood.na1d`, ``num_heads`` that does not
            divide ``embed_dim``, or an unknown ``small_maps``; in a call, an input of the wrong
            shape, or smaller than the window with ``small_maps="refuse"``.
    """

    rank = 1


class NeighborhoodAttention2D(_NeighborhoodAttention):
    """See :func:`ops.neighborhood.na2d`: (B, H, W, embed_dim) → (B, H, W, embed_dim).

    Arguments and errors as in :class:`NeighborhoodAttention1D`.
    """

    rank = 2


class NeighborhoodAttention3D(_NeighborhoodAttention):
    """See :func:`ops.neighborhood.na3d`: (B, T, H, W, embed_dim) → (B, T, H, W, embed_dim).

    Arguments and errors as in :class:`NeighborhoodAttention1D`.
    """

    rank = 3
