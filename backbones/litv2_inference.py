"""Inference forms of LITv2's blocks, see :mod:`ops.inference`."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from backbones import litv2
from ops.cpu.deformable.deformable_conv import deformable_conv2d, pack_taps
from ops.inference.attention import FastHiLoAttention
from ops.inference.forms import stands_for
from ops.inference.layers import FastConv2d
from ops.inference.mlp import FastDWMlp

__all__ = ["LITv2Block", "LITv2DeformableConv2d"]


@stands_for(litv2.Block)
class LITv2Block(litv2.Block):
    """Attention and MLP add their shortcuts, the MLP takes its norm."""

    needs: ClassVar = {"attn": (FastHiLoAttention, type(None)), "mlp": FastDWMlp}

    def forward(self, x: Tensor) -> Tensor:
        if self.norm1 is not None and self.attn is not None:
            x = self.attn(self.norm1(x), x)
        return self.mlp(x, x, self.norm2)


@stands_for(litv2.DeformableConv2d)
class LITv2DeformableConv2d(FastConv2d, litv2.DeformableConv2d):
    """Sampling, linear map and activation in one kernel."""

    kernels: ClassVar = (deformable_conv2d,)

    def forward(self, x: Tensor) -> Tensor:
        derived = self.derived(x)
        if derived is None:
            return self._finish(litv2.DeformableConv2d.forward(self, x))
        weight, bias = derived
        out: Tensor = deformable_conv2d(x, self.offset(x), weight, bias, 2, 2, self.activation)
        return out

    def derive(self, x: Tensor) -> Any:
        assert self.bias is not None
        return pack_taps(self.weight), self.bias.detach().float()
