"""Inference forms of MedViTV2's blocks, see :mod:`ops.inference`."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from backbones.medvitv2 import blocks
from ops.cpu.layout.nchw import nchw_from_nhwc, nhwc_from_nchw
from ops.inference.layers import FastForm, stands_for
from ops.rewriting.lift import affine_of

__all__ = ["MedViTV2GlobalBlock", "MedViTV2LocalBlock"]


@stands_for(blocks.FoldedLocalBlock)
class MedViTV2LocalBlock(FastForm, blocks.FoldedLocalBlock):
    """The norm converts to NCHW."""

    kernels: ClassVar = (nchw_from_nhwc,)

    def fast(self, x: Tensor, derived: Tensor) -> Tensor:
        x = _add_reinterpreted(self.attn, x, derived)
        return x + self.scale.view(1, -1, 1, 1) * x + self.ffn(x)

    def derive(self, x: Tensor) -> Tensor:
        return torch.stack(affine_of(self.norm1))


@stands_for(blocks.GlobalBlock)
class MedViTV2GlobalBlock(FastForm, blocks.GlobalBlock):
    """The second norm converts to NCHW."""

    kernels: ClassVar = (nchw_from_nhwc,)

    def fast(self, x: Tensor, derived: Tensor) -> Tensor:
        return _add_reinterpreted(self.kan, self.mix(x), derived)

    def derive(self, x: Tensor) -> Tensor:
        return torch.stack(affine_of(self.norm2))


def _add_reinterpreted(layer: nn.Module, x: Tensor, affine: Tensor) -> Tensor:
    """``x`` plus a layer applied to its norm, see :func:`blocks.apply_reinterpreted`."""
    batch, dim, height, width = x.shape
    mixed = layer(nchw_from_nhwc(x, affine).view(batch, height, width, dim))
    return nhwc_from_nchw(mixed.reshape(x.shape), x)
