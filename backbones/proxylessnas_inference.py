"""Inference form of ProxylessNAS' blocks, see :mod:`ops.inference`."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from ops.cpu.feed_forward.depthwise_mlp import PackedDepthwiseMlp, depthwise_mlp
from ops.inference.forms import stands_for
from ops.inference.layers import FastLayer, FastPointwiseConv2d, tensors_of
from ops.mobile import MBConv

__all__ = ["ProxylessNASBlock"]


@stands_for(MBConv)
class ProxylessNASBlock(FastLayer, MBConv):
    """The last layer adds the shortcut; all run in one pass where it pays."""

    needs: ClassVar = {"project": FastPointwiseConv2d}
    kernels: ClassVar = (depthwise_mlp,)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.has_shortcut else None
        packed, tokens = self.derived(x), x.permute(0, 2, 3, 1)
        if packed is None or not packed.shares_out(tokens):
            return self.project(self.dwconv(self.expand(x)), shortcut)
        return packed(tokens, None if shortcut is None else tokens).permute(0, 3, 1, 2)

    def sources(self) -> list[Tensor]:
        return tensors_of(*self._layers())

    def _layers(self) -> list[Any]:
        """The convolutions, of which the first may be missing."""
        parts = (self.expand, self.dwconv, self.project)
        return [m for part in parts for m in part.modules() if isinstance(m, nn.Conv2d)]

    def derive(self, x: Tensor) -> PackedDepthwiseMlp | None:
        *expand, dwconv, project = self._layers()
        if not PackedDepthwiseMlp.takes(dwconv, is_first=not expand):
            return None
        first, activation = (expand[0], expand[0].activation) if expand else (None, "none")
        return PackedDepthwiseMlp(first, dwconv, project, activation, dwconv.activation)
