"""The inference form of the block of NAT, DiNAT, DiNAT_s and the isotropic networks."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from backbones import nat_blocks
from ops.inference.mlp import FastMlp
from ops.inference.neighborhood import FastNeighborhoodAttention2D
from ops.replay.module import recorded_form

__all__ = ["FORMS"]


class NATBlock(nat_blocks.Block):
    """Attention and MLP add their shortcuts, the MLP takes its norm."""

    needs: ClassVar = {"attn": FastNeighborhoodAttention2D, "mlp": FastMlp}

    def forward(self, x: Tensor) -> Tensor:
        x = self.attn(self.norm1(x), x)
        return self.mlp(x, x, self.norm2)


FORMS: dict[type[Any], type[Any]] = {
    nat_blocks.Block: NATBlock,
    nat_blocks.TokenStage: recorded_form(nat_blocks.TokenStage),
}
