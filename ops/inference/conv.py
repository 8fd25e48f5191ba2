"""Inference layers around depthwise convolutions: InceptionNeXt's branches, the squeeze after."""

from __future__ import annotations

from typing import Any, ClassVar

from timm.layers import SqueezeExcite
from torch import Tensor

from ops.attention.large_kernel import DilatedDepthwiseConv2d
from ops.conv import InceptionDWConv2d
from ops.depthwise import depthwise_branches, taps_first, unsupported
from ops.inference.layers import FastDepthwiseConv2d, FastLayer

__all__ = ["FastDilatedDepthwiseConv2d", "FastInceptionDWConv2d", "FastSqueezeExcite"]


class FastDilatedDepthwiseConv2d(FastDepthwiseConv2d, DilatedDepthwiseConv2d):
    """By our kernel, which skips the gaps between the taps."""


class FastInceptionDWConv2d(FastLayer, InceptionDWConv2d):
    """All branches into one map, see :func:`ops.depthwise.depthwise_branches`."""

    def forward(self, x: Tensor) -> Tensor:
        derived = self.derived(x)
        return super().forward(x) if derived is None else depthwise_branches(x, *derived)

    def sources(self) -> list[Tensor]:
        branches = (self.dwconv_hw, self.dwconv_w, self.dwconv_h)
        return [p for branch in branches for p in (branch.weight, branch.bias) if p is not None]

    def derive(self, x: Tensor) -> Any:
        if unsupported((1, 1), x.device, x.dtype) is not None:
            return None
        weights, biases = self.sources()[::2], self.sources()[1::2]
        return [taps_first(w) for w in weights], [b.detach().float() for b in biases]


class FastSqueezeExcite(SqueezeExcite):
    """Means that go along with the memory. What comes in is overwritten, unless it has a gradient:

    in all of our networks it is the output of a convolution, which nothing else sees.
    """

    followed: ClassVar = {"act": ("fc1",)}

    def forward(self, x: Tensor) -> Tensor:
        gates = self.gates(x)[:, :, None, None]
        return x * gates if x.requires_grad else x.mul_(gates)

    def gates(self, x: Tensor) -> Tensor:
        """What the channels are to be multiplied by: (B, dim, H, W) → (B, dim)."""
        squeezed = x.permute(0, 2, 3, 1).flatten(1, 2).mean(1)
        return self.gate(self.fc2.on_last(self.act(self.fc1.on_last(squeezed))))
