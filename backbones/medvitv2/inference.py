"""Inference forms of MedViTV2's blocks, see :mod:`ops.inference`."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from backbones.medvitv2 import blocks
from ops.cpu.layout.nchw import nchw_from_nhwc, nhwc_from_nchw
from ops.inference.forms import stands_for
from ops.inference.layers import FastLayer
from ops.reparam import norm_affine

__all__ = ["MedViTV2GlobalBlock", "MedViTV2LocalBlock"]


@stands_for(blocks.FoldedLocalBlock, where=lambda block: isinstance(block.norm1, nn.BatchNorm2d))
class MedViTV2LocalBlock(FastLayer, blocks.FoldedLocalBlock):
    """The norm converts to NCHW."""

    def forward(self, x: Tensor) -> Tensor:
        derived = self.derived(x)
        if derived is None:
            return super().forward(x)
        x = _add_reinterpreted(self.attn, x, self.norm1, *derived)
        return x + self.scale.view(1, -1, 1, 1) * x + self.ffn(x)

    def sources(self) -> list[Tensor]:
        return _tensors_of(self.norm1)

    def derive(self, x: Tensor) -> tuple[Tensor | None]:
        return (_affine(self.norm1, x),)


@stands_for(blocks.GlobalBlock, where=lambda block: isinstance(block.norm2, nn.BatchNorm2d))
class MedViTV2GlobalBlock(FastLayer, blocks.GlobalBlock):
    """The second norm converts to NCHW."""

    def forward(self, x: Tensor) -> Tensor:
        derived = self.derived(x)
        if derived is None:
            return super().forward(x)
        return _add_reinterpreted(self.kan, self.mix(x), self.norm2, *derived)

    def sources(self) -> list[Tensor]:
        return _tensors_of(self.norm2)

    def derive(self, x: Tensor) -> tuple[Tensor | None]:
        return (_affine(self.norm2, x),)


def _tensors_of(norm: nn.BatchNorm2d) -> list[Tensor]:
    return [t for t in norm.state_dict(keep_vars=True).values() if t.is_floating_point()]


def _affine(norm: nn.BatchNorm2d, x: Tensor) -> Tensor | None:
    """Scale and shift (2, C) in float32, or None where there is no kernel for them."""
    if nchw_from_nhwc.unavailable(x.device, x.dtype) is not None:
        return None
    return torch.stack([t.detach() for t in norm_affine(copy.deepcopy(norm).float())])


def _add_reinterpreted(
    layer: nn.Module, x: Tensor, norm: nn.BatchNorm2d, affine: Tensor | None
) -> Tensor:
    """``x`` plus a layer applied to its norm, see :func:`blocks.apply_reinterpreted`."""
    if affine is None:
        return x + blocks.apply_reinterpreted(layer, norm(x))
    batch, dim, height, width = x.shape
    mixed = layer(nchw_from_nhwc(x, affine).view(batch, height, width, dim))
    return nhwc_from_nchw(mixed.reshape(x.shape), x)
