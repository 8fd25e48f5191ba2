"""Inference forms of neighborhood attention and its block."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from ops.inference.forms import stands_for
from ops.inference.layers import FastLinear
from ops.inference.mlp import FastMlp
from ops.neighborhood import NeighborhoodAttention2D
from ops.neighborhood.block import MapAttention, NeighborhoodBlock

__all__ = ["FastMapAttention", "FastNeighborhoodAttention2D", "FastNeighborhoodBlock"]


@stands_for(NeighborhoodAttention2D)
class FastNeighborhoodAttention2D(NeighborhoodAttention2D):
    """The projection adds the shortcut: (B, H, W, embed_dim) → the same, plus ``residual``."""

    needs: ClassVar = {"proj": FastLinear}

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        height, width = x.shape[1:3]
        padded = self.pad(x)
        out = self.attend(self.qkv(padded))
        if padded is not x:
            out = out[:, :height, :width]
        return self.proj(out, residual)


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
