"""The inference form of Kolmogorov-Arnold layers."""

from __future__ import annotations

from torch import Tensor

from ops.cpu.feed_forward.kan import PackedKAN, kan_layer, pack_kan
from ops.inference.forms import stands_for
from ops.inference.layers import FastLayer, tensors_of
from ops.kan import KANLayer

__all__ = ["FastKANLayer"]


@stands_for(KANLayer)
class FastKANLayer(FastLayer, KANLayer):
    """In one pass where the kernel can be had."""

    def forward(self, x: Tensor) -> Tensor:
        packed = self.derived(x)
        return super().forward(x) if packed is None else kan_layer(x, *packed)

    def sources(self) -> list[Tensor]:
        return [self.linear.weight, self.grid, *tensors_of(self.norm)]

    def derive(self, x: Tensor) -> PackedKAN | None:
        return None if kan_layer.unsupported(x.device, x.dtype) is not None else pack_kan(self)
