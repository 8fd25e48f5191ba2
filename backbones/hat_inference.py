"""Inference forms of HAT's blocks, see :mod:`ops.inference`."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from backbones import hat_blocks
from ops.inference.conv import FastSqueezeExcite
from ops.inference.forms import stands_for
from ops.inference.layers import runs_fast
from ops.inference.mlp import FastMlp
from ops.inference.window import FastOverlappingWindowAttention, FastWindowAttention
from ops.replay.module import Recorded

__all__ = ["HATChannelAttentionConv", "HATHybridBlock", "HATOverlapBlock", "HATResidualGroup"]


@stands_for(hat_blocks.ChannelAttentionConv)
class HATChannelAttentionConv(hat_blocks.ChannelAttentionConv):
    """The first convolution applies the activation."""

    followed: ClassVar = {"act": ("conv1",)}
    needs: ClassVar = {"se": FastSqueezeExcite}

    def map_and_gates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, dim, H, W) → (B, dim, H, W) and its channel gates (B, dim)."""
        x = self.conv2(self.act(self.conv1(x)))
        return x, self.se.gates(x)


@stands_for(hat_blocks.HybridBlock)
class HATHybridBlock(hat_blocks.HybridBlock):
    """Gates and scale of the channel branch are applied as it is added."""

    needs: ClassVar = {"attn": FastWindowAttention, "conv": HATChannelAttentionConv, "mlp": FastMlp}

    def forward(
        self,
        x: Tensor,
        index: Tensor | None,
        masks: Tensor | None,
        overlap_index: Tensor | None,
    ) -> Tensor:
        normed = self.norm1(x)
        conv: Any = self.conv
        branch, gates = conv.map_and_gates(normed.permute(0, 3, 1, 2))
        gates = (gates * hat_blocks.CONV_SCALE)[:, None, None]
        x = torch.addcmul(x, branch.permute(0, 2, 3, 1), gates)
        x = self.attn(normed, index, masks, x)
        return self.mlp(x, x, self.norm2)


@stands_for(hat_blocks.OverlapBlock)
class HATOverlapBlock(hat_blocks.OverlapBlock):
    """Attention and MLP add their shortcuts, the MLP takes its norm."""

    needs: ClassVar = {"attn": FastOverlappingWindowAttention, "mlp": FastMlp}

    def forward(
        self,
        x: Tensor,
        index: Tensor | None,
        masks: Tensor | None,
        overlap_index: Tensor | None,
    ) -> Tensor:
        x = self.attn(self.norm1(x), overlap_index, x)
        return self.mlp(x, x, self.norm2)


@stands_for(hat_blocks.ResidualGroup)
class HATResidualGroup(Recorded, hat_blocks.ResidualGroup):
    """Skips computing index tables that the attention caches itself."""

    needs: ClassVar = {"blocks": (HATHybridBlock, HATOverlapBlock)}

    def compute(self, x: Tensor) -> Tensor:
        if not runs_fast(x, next(self.parameters())):
            return super().compute(x)
        deep = self.run_blocks(x.permute(0, 2, 3, 1), None, None, None)
        return self.conv(deep.permute(0, 3, 1, 2)).add_(x)
