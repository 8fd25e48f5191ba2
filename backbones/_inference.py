"""Inference forms of convolutional families' blocks, see :mod:`ops.inference`: fewer passes."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from backbones import inception_next, unireplknet, van
from backbones.core import base
from ops.cpu.feed_forward.response_mlp import PackedResponseMlp, response_mlp
from ops.inference.conv import FastSqueezeExcite
from ops.inference.layers import FastLayer, FastLinear, FastPointwiseConv2d, runs_fast, tensors_of
from ops.inference.mlp import FastConvMlp, NormedMlp
from ops.replay.module import recorded_form

__all__ = ["FORMS"]


class InceptionNeXtBlock(inception_next.Block):
    """The MLP adds the shortcut."""

    needs: ClassVar = {"mlp": FastConvMlp}

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.token_mixer(x), residual=x)


class UniRepLKNetBlock(FastLayer, unireplknet.Block):
    """All that follows the depthwise convolution in one pass."""

    followed: ClassVar = {"act": ("fc1",)}
    needs: ClassVar = {"se": FastSqueezeExcite, "fc1": FastLinear, "fc2": FastLinear}

    def forward(self, x: Tensor) -> Tensor:
        if not runs_fast(x, self.fc1.weight):
            return super().forward(x)
        derived = self.derived(x)
        mixed, shortcut = self.dwconv(x).permute(0, 2, 3, 1), x.permute(0, 2, 3, 1)
        if derived is None:
            return self._mlp(mixed, shortcut).permute(0, 3, 1, 2)
        return derived(mixed, shortcut).permute(0, 3, 1, 2)

    def _mlp(self, x: Tensor, shortcut: Tensor) -> Tensor:
        """Gates, response norm and shortcut on the way through the linear layers."""
        se: Any = self.se
        fc1: Any = self.fc1
        hidden, energy = fc1.energy(x, se.gates(x.permute(0, 3, 1, 2)))
        norm = energy.sqrt()
        share = norm / (norm.mean(dim=-1, keepdim=True) + self.grn.eps)
        return self.fc2(hidden, shortcut, 1 + self.grn.weight.view(1, -1) * share)

    def sources(self) -> list[Tensor]:
        layers = (self.fc1, self.fc2, self.se.fc1, self.se.fc2)
        return [*tensors_of(*layers), self.grn.weight]

    def derive(self, x: Tensor) -> PackedResponseMlp | None:
        if response_mlp.unsupported(x.device, x.dtype) is not None:
            return None
        se = self.se
        return PackedResponseMlp(se.fc1, se.fc2, self.fc1, self.fc2, self.grn.weight, self.grn.eps)


class VANAttention(van.Attention):
    """The last projection adds the shortcut."""

    followed: ClassVar = {"act": ("proj_in",)}
    needs: ClassVar = {"proj_out": FastPointwiseConv2d}

    def forward(self, x: Tensor, residual_scale: Tensor | None = None) -> Tensor:
        mixed = self.lka(self.act(self.proj_in(x)))
        return self.proj_out(mixed, x, residual_scale=residual_scale)


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


FORMS: dict[type[Any], type[Any]] = {
    base.Stage: recorded_form(base.Stage),
    inception_next.Block: InceptionNeXtBlock,
    unireplknet.Block: UniRepLKNetBlock,
    van.Attention: VANAttention,
    van.FoldedBlock: VANBlock,
    van.ConvMlp: VANConvMlp,
}
