"""Inference forms of neighborhood attention and its block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from ops.inference.forms import stands_for
from ops.inference.layers import FastLayer, FastLinear
from ops.inference.mlp import FastMlp
from ops.neighborhood import NeighborhoodAttention2D
from ops.neighborhood.block import MapAttention, NeighborhoodBlock

__all__ = ["FastMapAttention", "FastNeighborhoodAttention2D", "FastNeighborhoodBlock"]


@stands_for(NeighborhoodAttention2D)
class FastNeighborhoodAttention2D(FastLayer, NeighborhoodAttention2D):
    """The projection adds the shortcut: (B, H, W, embed_dim) → the same, plus ``residual``.

    The position bias is kept in float32, which the kernel reads.
    """

    needs: ClassVar = {"proj": FastLinear}

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        height, width = x.shape[1:3]
        qkv = self.qkv(x)
        padded = self.pad(qkv)
        out = self.attend(padded)
        if padded is not qkv:
            out = out[:, :height, :width]
        return self.proj(out, residual)

    def window(self, size: Sequence[int]) -> tuple[Any, Any, Any, Tensor | None]:
        kernel_size, stride, dilation, rpb = super().window(size)
        if self.rpb is not None and rpb is self.rpb:
            wide = self.derived(self.rpb)
            rpb = rpb if wide is None else wide
        return kernel_size, stride, dilation, rpb

    def sources(self) -> list[Tensor]:
        return [] if self.rpb is None else [self.rpb]

    def derive(self, x: Tensor) -> Tensor:
        return x.detach().float()


@stands_for(MapAttention)
class FastMapAttention(FastNeighborhoodAttention2D, MapAttention):
    """The projection adds the shortcut."""


@stands_for(NeighborhoodBlock)
class FastNeighborhoodBlock(NeighborhoodBlock):
    """Attention and MLP add their shortcuts; the MLP includes its norm."""

    needs: ClassVar = {"attn": FastNeighborhoodAttention2D, "mlp": FastMlp}

    def forward(self, x: Tensor) -> Tensor:
        x = self.attn(self.norm1(x), x)
        return self.mlp(x, x, self.norm2)
