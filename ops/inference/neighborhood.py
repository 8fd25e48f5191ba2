"""The inference form of neighborhood attention: the projection adds the shortcut."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from ops.inference.forms import stands_for
from ops.inference.layers import FastLinear
from ops.neighborhood import NeighborhoodAttention2D

__all__ = ["FastNeighborhoodAttention2D"]


@stands_for(NeighborhoodAttention2D)
class FastNeighborhoodAttention2D(NeighborhoodAttention2D):
    """(B, H, W, embed_dim) → (B, H, W, embed_dim), plus ``residual``."""

    needs: ClassVar = {"proj": FastLinear}

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        height, width = x.shape[1:3]
        padded = self.pad(x)
        out = self.attend(self.qkv(padded))
        if padded is not x:
            out = out[:, :height, :width]
        return self.proj(out, residual)
