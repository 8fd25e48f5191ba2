"""Inference forms of BiFormer's blocks, see :mod:`ops.inference`."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from backbones import biformer
from ops.cpu.attention.grouped import split_heads
from ops.inference.attention import FastBiLevelRoutingAttention, attend_tokens
from ops.inference.forms import stands_for
from ops.inference.layers import FastLinear
from ops.inference.mlp import FastMlp

__all__ = ["BiFormerBlock", "BiFormerGlobalAttention"]


@stands_for(biformer.GlobalAttention)
class BiFormerGlobalAttention(biformer.GlobalAttention):
    """The projection adds the shortcut."""

    needs: ClassVar = {"proj": FastLinear}

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        qkv = self.qkv(x)
        query, key, value = split_heads(qkv, 3, self.num_heads)
        out = attend_tokens(query, key, value, self.qkv.weight).reshape(x.shape)
        source = qkv.chunk(3, dim=-1)[2] if self.lepe_on_value else x
        out = out + self.lepe(source.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.proj(out, residual)


@stands_for(biformer.Block)
class BiFormerBlock(biformer.Block):
    """Attention and MLP add their shortcuts, the MLP takes its norm."""

    needs: ClassVar = {
        "attn": (FastBiLevelRoutingAttention, BiFormerGlobalAttention),
        "mlp": FastMlp,
    }

    def forward(self, x: Tensor) -> Tensor:
        x = self.pos_embed(x).permute(0, 2, 3, 1)
        x = self.attn(self.norm1(x), x)
        return self.mlp(x, x, self.norm2).permute(0, 3, 1, 2)
