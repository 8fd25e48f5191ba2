"""Inference forms of RAVLT's blocks, see :mod:`ops.inference`."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from backbones import ravlt
from ops.inference.attention import FastRankAugmentedAttention
from ops.inference.forms import stands_for
from ops.inference.layers import FastLinear, runs_fast
from ops.inference.mlp import NormedMlp
from ops.replay.module import Recorded

__all__ = ["RAVLTBlock", "RAVLTConvMlp", "RAVLTStage"]


@stands_for(ravlt.ConvMlp)
class RAVLTConvMlp(NormedMlp, ravlt.ConvMlp):
    """(B, H, W, dim) → (B, H, W, dim)."""

    followed: ClassVar = {"act": ("fc1",)}
    needs: ClassVar = {"fc2": FastLinear}

    def in_layers(self, x: Tensor, residual: Tensor | None) -> Tensor:
        x = self.act(self.fc1(x)).permute(0, 3, 1, 2)
        return self.fc2(self.dwconv(x).permute(0, 2, 3, 1), residual)

    def conv(self) -> nn.Module:
        return self.dwconv


@stands_for(ravlt.Block)
class RAVLTBlock(ravlt.Block):
    """Attention and MLP add their shortcuts, the MLP takes its norm."""

    needs: ClassVar[dict[str, Any]] = {"attn": FastRankAugmentedAttention, "mlp": RAVLTConvMlp}

    def forward(self, x: Tensor, sin: Tensor | None, cos: Tensor | None) -> Tensor:
        x = self.pos(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        rotary = None if sin is None or cos is None else (sin, cos)
        x = self.attn(self.norm1(x), rotary, x)
        return self.mlp(x, x, self.norm2)


@stands_for(ravlt.RAVLTStage)
class RAVLTStage(Recorded, ravlt.RAVLTStage):
    """Skips computing the rotary table that the attention caches itself."""

    needs: ClassVar = {"blocks": RAVLTBlock}

    def compute(self, x: Tensor) -> Tensor:
        if not runs_fast(x, next(self.parameters())):
            return super().compute(x)
        x = self.downsample(x).permute(0, 2, 3, 1)
        return self.run_blocks(x, None, None).permute(0, 3, 1, 2)
