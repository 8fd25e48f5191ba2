"""Inference forms of neighborhood attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ops.inference.forms import stands_for
from ops.inference.layers import FastLayer
from ops.neighborhood import NeighborhoodAttention2D
from ops.neighborhood.block import MapAttention

__all__ = ["FastMapAttention", "FastNeighborhoodAttention2D"]


@stands_for(NeighborhoodAttention2D)
class FastNeighborhoodAttention2D(FastLayer, NeighborhoodAttention2D):
    """The position bias is kept in float32, which the kernel reads."""

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
    """The same on maps."""
