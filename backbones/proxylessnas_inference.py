"""Inference form of ProxylessNAS' blocks, see :mod:`ops.inference`."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from backbones import proxylessnas
from ops.cpu import policy
from ops.cpu.feed_forward.depthwise_mlp import PackedDepthwiseMlp, depthwise_mlp
from ops.inference.forms import stands_for
from ops.inference.layers import FastLayer, FastPointwiseConv2d, tensors_of

__all__ = ["ProxylessNASBlock"]


@stands_for(proxylessnas.MBConv)
class ProxylessNASBlock(FastLayer, proxylessnas.MBConv):
    """The last layer adds the shortcut; 3×3 blocks of stride 1 run in one pass."""

    needs: ClassVar = {"project": FastPointwiseConv2d}

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.has_shortcut else None
        packed = self.derived(x)
        if packed is None:
            return self.project(self.dwconv(self.expand(x)), shortcut)
        tokens = x.permute(0, 2, 3, 1)
        return packed(tokens, None if shortcut is None else tokens).permute(0, 3, 1, 2)

    def sources(self) -> list[Tensor]:
        return tensors_of(*self._layers())

    def _layers(self) -> list[Any]:
        """The convolutions, of which the first may be missing."""
        parts = (self.expand, self.dwconv, self.project)
        return [m for part in parts for m in part.modules() if isinstance(m, nn.Conv2d)]

    def derive(self, x: Tensor) -> PackedDepthwiseMlp | None:
        if depthwise_mlp.unsupported(x.device, x.dtype) is not None:
            return None
        layers = self._layers()
        if len(layers) < 3 or not policy.feed_forward_by_kernel(x.dtype):
            return None
        expand, dwconv, project = layers
        if (dwconv.kernel_size, dwconv.stride) != ((3, 3), (1, 1)):
            return None
        return PackedDepthwiseMlp(expand, dwconv, project, expand.activation, dwconv.activation)
