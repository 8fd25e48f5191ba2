"""Inference forms of VAN's blocks, see :mod:`ops.inference`."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from backbones import van
from ops.inference.forms import stands_for
from ops.inference.layers import FastLayer, FastPointwiseConv2d
from ops.inference.mlp import NormedMlp

__all__ = ["VANAttention", "VANBlock", "VANConvMlp"]


@stands_for(van.Attention)
class VANAttention(van.Attention):
    """The last projection adds the shortcut."""

    followed: ClassVar = {"act": ("proj_in",)}
    needs: ClassVar = {"proj_out": FastPointwiseConv2d}

    def forward(self, x: Tensor, residual_scale: Tensor | None = None) -> Tensor:
        mixed = self.lka(self.act(self.proj_in(x)))
        return self.proj_out(mixed, x, residual_scale=residual_scale)


@stands_for(van.ConvMlp)
class VANConvMlp(NormedMlp, van.ConvMlp):
    """(B, dim, H, W) → (B, dim, H, W), channels-last."""

    followed: ClassVar = {"act": ("dwconv",)}
    needs: ClassVar = {"fc2": FastPointwiseConv2d}

    def forward(
        self, x: Tensor, residual: Tensor | None = None, norm: nn.LayerNorm | None = None
    ) -> Tensor:
        shortcut = None if residual is None else residual.permute(0, 2, 3, 1)
        return super().forward(x.permute(0, 2, 3, 1), shortcut, norm).permute(0, 3, 1, 2)

    def in_layers(self, x: Tensor, residual: Tensor | None) -> Tensor:
        hidden = self.act(self.dwconv(self.fc1(x.permute(0, 3, 1, 2))))
        shortcut = None if residual is None else residual.permute(0, 3, 1, 2)
        return self.fc2(hidden, shortcut).permute(0, 2, 3, 1)

    def conv(self) -> nn.Module:
        return self.dwconv


@stands_for(van.FoldedBlock)
class VANBlock(FastLayer, van.FoldedBlock):
    """The attention adds both of its shortcuts, the MLP its own."""

    needs: ClassVar = {"attn": VANAttention, "mlp": VANConvMlp}

    def forward(self, x: Tensor) -> Tensor:
        residual_scale = self.derived(x)
        if residual_scale is None:
            return super().forward(x)
        x = self.attn(x, residual_scale)
        return self.mlp(x, x)

    def sources(self) -> list[Tensor]:
        return [self.scale]

    def derive(self, x: Tensor) -> Tensor:
        return 1 + self.scale.detach().float()
