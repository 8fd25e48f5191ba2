"""Inference forms of norms with our kernels; layer norm with the following activation."""

from __future__ import annotations

from typing import Any, ClassVar

from timm.layers import RmsNorm2d
from torch import Tensor, nn

from ops.cpu.norm.layer_norm import layer_norm
from ops.cpu.norm.norms import rms_norm
from ops.inference.layers import ActivatedLayer, FastForm, stands_for

__all__ = ["FastLayerNorm", "FastRmsNorm2d"]


class FastLayerNorm(ActivatedLayer, nn.LayerNorm):
    """``activation(norm(x))``, (..., dim) → (..., dim)."""

    kernels: ClassVar = (layer_norm,)

    def forward(self, x: Tensor) -> Tensor:
        packed = self.derived(x)
        if packed is None:
            return self._finish(super().forward(x))
        out: Tensor = layer_norm(x, *packed, self.activation)
        return out

    def derive(self, x: Tensor) -> tuple[Tensor, Tensor, float]:
        return self.weight.detach().float(), self.bias.detach().float(), self.eps


@stands_for(RmsNorm2d)
class FastRmsNorm2d(FastForm, RmsNorm2d):
    """(B, C, H, W) → (B, C, H, W)."""

    kernels: ClassVar = (rms_norm,)
    weight: Any
    eps: Any

    def fast(self, x: Tensor, derived: tuple[()]) -> Tensor:
        out: Tensor = rms_norm(x.permute(0, 2, 3, 1), self.weight.float(), self.eps)
        return out.permute(0, 3, 1, 2)
