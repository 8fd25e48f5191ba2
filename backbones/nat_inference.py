"""Inference form of the blocks of NAT and its kin, see :mod:`ops.inference`: fewer passes."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from backbones import nat_blocks
from ops.inference.forms import stands_for
from ops.inference.mlp import FastMlp
from ops.inference.neighborhood import FastNeighborhoodAttention2D
from ops.replay.module import recorded_form

__all__ = ["NATBlock", "NATMapAttention"]


@stands_for(nat_blocks.MapAttention)
class NATMapAttention(FastNeighborhoodAttention2D, nat_blocks.MapAttention):
    """The projection adds the shortcut."""


@stands_for(nat_blocks.Block)
class NATBlock(nat_blocks.Block):
    """Attention and MLP add their shortcuts, the MLP takes its norm."""

    needs: ClassVar = {"attn": FastNeighborhoodAttention2D, "mlp": FastMlp}

    def forward(self, x: Tensor) -> Tensor:
        x = self.attn(self.norm1(x), x)
        return self.mlp(x, x, self.norm2)


stands_for(nat_blocks.TokenStage)(recorded_form(nat_blocks.TokenStage))
