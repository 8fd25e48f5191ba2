"""The residual block of transformers, of whatever attention and feed-forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from timm.layers import DropPath, LayerScale
from torch import Tensor, nn


class PreNormBlock(nn.Module):
    """Pre-norm residual attention and feed-forward: (B, h, w, dim) → (B, h, w, dim).

    Args:
        attn: None for the feed-forward alone.
        norm_layer: makes the norms from the channels.
        layer_scale: initial value of the layer scales; None for none.
        scale_layer: makes them from the channels and their value.
    """

    norm1: Any
    attn: Any
    ls1: Any
    norm2: Any
    mlp: Any
    ls2: Any

    def __init__(
        self,
        dim: int,
        attn: nn.Module | None,
        mlp: nn.Module,
        norm_layer: Callable[[int], nn.Module],
        drop_path: float,
        layer_scale: float | None = None,
        scale_layer: Callable[[int, float], nn.Module] = LayerScale,
    ) -> None:
        super().__init__()

        def scale() -> nn.Module:
            return nn.Identity() if layer_scale is None else scale_layer(dim, layer_scale)

        self.norm1 = norm_layer(dim) if attn is not None else None
        self.attn = attn
        self.ls1 = scale()
        self.norm2 = norm_layer(dim)
        self.mlp = mlp
        self.ls2 = scale()
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        if self.attn is not None:
            x = x + self.drop_path(self.ls1(self.attn(self.norm1(x))))
        return x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))
