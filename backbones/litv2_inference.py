"""The inference form of LITv2's convolution, see :mod:`ops.inference`."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from backbones import litv2
from ops.cpu.deformable.deformable_conv import deformable_conv2d, pack_taps
from ops.inference.forms import stands_for
from ops.inference.layers import FastConv2d

__all__ = ["LITv2DeformableConv2d"]


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
