"""Inference forms of depthwise convolutions and of layers around them in some families."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ops.attention.large_kernel import DilatedDepthwiseConv2d
from ops.conv import InceptionDWConv2d
from ops.cpu import policy
from ops.cpu.depthwise.conv import depthwise_branches, depthwise_conv2d, taps_first, unavailable
from ops.inference.layers import FastConv2d, FastForm, stands_for

__all__ = [
    "FastDepthwiseConv2d",
    "FastDilatedDepthwiseConv2d",
    "FastInceptionDWConv2d",
]


class FastDepthwiseConv2d(FastConv2d):
    """Like :class:`FastConv2d`, with our own kernel where it is faster.

    With several outputs for each channel, oneDNN's takes up to ten times as long.
    """

    def pays(self, own: Any, x: Tensor) -> bool:
        is_nhwc = x.is_contiguous(memory_format=torch.channels_last)
        given: Any = self.kernel_size, self.padding, self.dilation, is_nhwc, x.dtype
        several = self.out_channels > self.in_channels
        return several or policy.depthwise_by_kernel(x.numel(), x.shape[1], *given)

    def for_kernel(self, x: Tensor) -> Callable[[Tensor, str], Any] | None:
        if unavailable(self.stride, x.device, x.dtype) is not None:
            return None
        bias = None if self.bias is None else self.bias.detach().float()
        given = taps_first(self.weight), bias, self.stride, self.padding, self.dilation
        return lambda x, activation: depthwise_conv2d(x, *given, activation)


@stands_for(DilatedDepthwiseConv2d)
class FastDilatedDepthwiseConv2d(FastForm, DilatedDepthwiseConv2d):
    """One convolution, since our kernel handles dilation directly."""

    kernels: ClassVar = (depthwise_conv2d,)

    def fast(self, x: Tensor, derived: tuple[()]) -> Tensor:
        if torch.is_grad_enabled():  # so the call is not recorded, and torch computes it
            return DilatedDepthwiseConv2d.forward(self, x)
        return nn.Conv2d.forward(self, x)


@stands_for(InceptionDWConv2d)
class FastInceptionDWConv2d(FastForm, InceptionDWConv2d):
    """All branches into one map, see :func:`ops.cpu.depthwise.conv.depthwise_branches`."""

    kernels: ClassVar = (depthwise_branches,)

    def fast(self, x: Tensor, derived: Any) -> Tensor:
        return depthwise_branches(x, *derived)

    def derive(self, x: Tensor) -> Any:
        layers: Any = self.dwconv_hw, self.dwconv_w, self.dwconv_h
        return [taps_first(c.weight) for c in layers], [c.bias.detach().float() for c in layers]
