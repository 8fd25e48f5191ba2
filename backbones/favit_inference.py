"""Inference forms of FaViT's blocks, see :mod:`ops.inference`."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from backbones import favit
from ops.inference.factorized import FastFactorizedAttention
from ops.inference.forms import stands_for
from ops.inference.mlp import FastDWMlp
from ops.replay.module import recorded_form

__all__ = ["FaViTBlock"]


@stands_for(favit.Block)
class FaViTBlock(favit.Block):
    """Attention and MLP add their shortcuts, the MLP takes its norm."""

    needs: ClassVar = {"attn": FastFactorizedAttention, "mlp": FastDWMlp}

    def forward(self, x: Tensor) -> Tensor:
        x = self.attn(self.norm1(x), x)
        return self.mlp(x, x, self.norm2)


stands_for(favit.FaViTStage)(recorded_form(favit.FaViTStage))
