"""The inference form of Kolmogorov-Arnold layers."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from ops.cpu.feed_forward.kan import LARGEST_POWER, PackedKAN, kan_layer
from ops.cpu.gemm.linear import pack_weight
from ops.inference.layers import FastForm, stands_for
from ops.kan import KANLayer

__all__ = ["FastKANLayer", "pack_kan"]


@stands_for(KANLayer)
class FastKANLayer(FastForm, KANLayer):
    """Runs in one pass if the kernel is available."""

    kernels: ClassVar = (kan_layer,)

    def fast(self, x: Tensor, derived: PackedKAN) -> Tensor:
        out: Tensor = kan_layer(x, *derived)
        return out

    def derive(self, x: Tensor) -> PackedKAN | None:
        return pack_kan(self)


def pack_kan(layer: KANLayer) -> PackedKAN | None:
    """The kernel's parameters of a layer, or None if its grid is finer than the kernel supports.

    Raises:
        RuntimeError: the kernel is not available here.
    """
    scale = 2 / (layer.width * math.log(2))
    grid = layer.grid.detach().double() * scale
    if grid.abs().max() > LARGEST_POWER:
        return None
    by_grid = layer.linear.weight.detach().unflatten(1, (-1, len(grid))).transpose(1, 2).flatten(1)
    norm_weight, norm_bias = (t.detach().float() for t in layer.norm.parameters())
    return PackedKAN(
        norm_weight,
        norm_bias,
        torch.exp2(grid).float(),
        pack_weight(by_grid),
        norm_bias.new_zeros(len(by_grid)),
        layer.norm.eps,
        scale,
    )
