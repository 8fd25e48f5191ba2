"""The inference form of layer norm on maps: channels-last, with the activation that follows."""

from __future__ import annotations

from typing import Any

from timm.layers import LayerNorm2d
from torch import Tensor

from ops.inference.layers import ActivatedLayer
from ops.norm import layer_norm, unsupported

__all__ = ["FastLayerNorm2d"]


class FastLayerNorm2d(ActivatedLayer, LayerNorm2d):
    """``activation(norm(x))``, (B, C, H, W) → (B, C, H, W)."""

    weight: Any
    bias: Any
    eps: Any

    def forward(self, x: Tensor) -> Tensor:
        derived = None if self.bias is None else self.derived(x)
        if derived is None:
            return self._finish(super().forward(x))
        tokens = x.permute(0, 2, 3, 1)
        weight, bias = derived
        out = layer_norm(tokens, weight, bias, self.eps, self.activation)
        return out.permute(0, 3, 1, 2)

    def derive(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        if unsupported(x.device, x.dtype) is not None:
            return None
        return self.weight.detach().float(), self.bias.detach().float()
