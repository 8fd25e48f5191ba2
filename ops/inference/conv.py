"""Inference forms of depthwise convolutions and of what stands around them in some families."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from timm.layers import SqueezeExcite
from torch import Tensor

from ops.attention.large_kernel import DilatedDepthwiseConv2d
from ops.conv import InceptionDWConv2d
from ops.depthwise import (
    depthwise_branches,
    depthwise_conv2d,
    prepare,
    taps_first,
    unsupported,
)
from ops.inference.layers import FastConv2d, FastLayer
from ops.inference.pooling import takes, window_means
from ops.native import multiplies
from ops.native.eager import Repeats

__all__ = [
    "FastDepthwiseConv2d",
    "FastDilatedDepthwiseConv2d",
    "FastInceptionDWConv2d",
    "FastSqueezeExcite",
]

# From this many taps on, or with other than square, dense windows, our kernel is the faster one.
_LARGE_WINDOW = 49
# So it is for maps of up to so many values: oneDNN takes longer to be called.
_SMALL_MAP = 1 << 17
_VECTOR = 16  # floats, at most


class PackedDepthwise:
    """A depthwise convolution with its taps in our kernel's order; the activation may change."""

    def __init__(self, conv: FastConv2d) -> None:
        bias = None if conv.bias is None else conv.bias.detach().float()
        self._tensors = taps_first(conv.weight), bias
        self._geometry: tuple[Any, Any, Any] = conv.stride, conv.padding, conv.dilation
        self._repeats = Repeats(self._prepare)

    def __call__(self, x: Tensor, activation: str) -> Tensor:
        """(B, C, H, W) → (B, C, H', W')."""
        way = self._repeats.find((x,), activation)
        if way is not None:
            return way(x)
        return depthwise_conv2d(x, *self._tensors, *self._geometry, activation)

    def _prepare(self, x: Tensor, activation: str) -> Callable[[Tensor], Tensor] | None:
        return prepare(x, *self._tensors, *self._geometry, activation)


class FastDepthwiseConv2d(FastConv2d):
    """As :class:`FastConv2d`, by our own kernel where that is the faster one."""

    def suits_kernel(self, x: Tensor) -> bool:
        return x.numel() <= _SMALL_MAP

    def derive(self, x: Tensor) -> tuple[Any, Any]:
        if unsupported(self.stride, x.device, x.dtype) is not None:
            return None, self.for_onednn(x)
        return PackedDepthwise(self), self.for_onednn(x) if self._suits_onednn(x) else None

    def _suits_onednn(self, x: Tensor) -> bool:
        rows, columns = self.kernel_size
        simple = rows == columns and self.dilation == (1, 1) and rows * columns < _LARGE_WINDOW
        # For these our kernel has a way of its own; but a part of a vector of bfloat16 is slow.
        own = self.kernel_size == (3, 3) and self.padding == (1, 1)
        simple &= not (own and (x.dtype == torch.float32 or x.shape[1] % _VECTOR == 0))
        # oneDNN would copy a part of the channels; our kernel reads it where it lies.
        simple &= x.is_contiguous(memory_format=torch.channels_last)
        return simple and multiplies(x.dtype)


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
    """Means that go along with the memory; the layer behind may take :meth:`gates` as scales."""

    followed: ClassVar = {"act": ("fc1",)}

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gates(x)[:, :, None, None]

    def gates(self, x: Tensor) -> Tensor:
        """What the channels are to be multiplied by: (B, dim, H, W) → (B, dim)."""
        pixels = x.permute(0, 2, 3, 1)
        if takes(x):
            squeezed = window_means(pixels, (x.shape[2], x.shape[3])).flatten(1)
        else:
            squeezed = pixels.flatten(1, 2).mean(1)
        return self.gate(self.fc2.on_last(self.act(self.fc1.on_last(squeezed))))
