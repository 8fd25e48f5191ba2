"""Inference forms of attention families' blocks, see :mod:`ops.inference`: fewer passes."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from backbones import biformer, favit, hat_blocks, litv2, medvitv2_blocks, ravlt
from ops.cpu.attention.grouped import split_heads
from ops.cpu.deformable.deformable_conv import deformable_conv2d, pack_taps
from ops.cpu.dispatch import takes_kernels
from ops.cpu.layout.nchw import join_planes, split_planes
from ops.inference.attention import (
    FastBiLevelRoutingAttention,
    FastHiLoAttention,
    FastRankAugmentedAttention,
    attend_tokens,
)
from ops.inference.conv import FastSqueezeExcite
from ops.inference.factorized import FastFactorizedAttention
from ops.inference.layers import (
    FastConv2d,
    FastLayer,
    FastLinear,
    FastPointwiseConv2d,
    runs_fast,
)
from ops.inference.mlp import FastDWMlp, FastMlp, NormedMlp
from ops.inference.window import FastOverlappingWindowAttention, FastWindowAttention
from ops.reparam import norm_affine
from ops.replay.module import Recorded, recorded_form

__all__ = ["FORMS"]


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


class HATChannelAttentionConv(hat_blocks.ChannelAttentionConv):
    """The first convolution applies the activation."""

    followed: ClassVar = {"act": ("conv1",)}
    needs: ClassVar = {"se": FastSqueezeExcite}

    def map_and_gates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, dim, H, W) → the same, and its gates (B, dim)."""
        x = self.conv2(self.act(self.conv1(x)))
        return x, self.se.gates(x)


class HATHybridBlock(hat_blocks.HybridBlock):
    """As the overlap block; gates and scale of the channel branch go with its addition."""

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


class HATResidualGroup(Recorded, hat_blocks.ResidualGroup):
    """Without the tables of positions where the attention keeps its own."""

    needs: ClassVar = {"blocks": (HATHybridBlock, HATOverlapBlock)}

    def compute(self, x: Tensor) -> Tensor:
        if not runs_fast(x, next(self.parameters())):
            return super().compute(x)
        deep = self.run_blocks(x.permute(0, 2, 3, 1), None, None, None)
        return self.conv(deep.permute(0, 3, 1, 2)).add_(x)


class LITv2Block(litv2.Block):
    """Attention and MLP add their shortcuts, the MLP takes its norm."""

    needs: ClassVar = {"attn": (FastHiLoAttention, type(None)), "mlp": FastDWMlp}

    def forward(self, x: Tensor) -> Tensor:
        if self.norm1 is not None and self.attn is not None:
            x = self.attn(self.norm1(x), x)
        return self.mlp(x, x, self.norm2)


class LITv2PatchEmbed(litv2.PatchEmbed):
    """Nothing is copied where there is nothing to pad."""

    def forward(self, x: Tensor) -> Tensor:
        whole = takes_kernels((x,)) and not (x.shape[2] % 4 or x.shape[3] % 4)
        return self.norm(self.conv(x)) if whole else super().forward(x)


class LITv2DeformableConv2d(FastConv2d, litv2.DeformableConv2d):
    """Taps, linear map and activation at once."""

    def forward(self, x: Tensor) -> Tensor:
        derived = self.derived(x)
        if derived is None:
            return self._finish(litv2.DeformableConv2d.forward(self, x))
        weight, bias = derived
        out: Tensor = deformable_conv2d(x, self.offset(x), weight, bias, 2, 2, self.activation)
        return out

    def derive(self, x: Tensor) -> Any:
        if deformable_conv2d.unsupported(x.device, x.dtype) is not None:
            return None
        assert self.bias is not None
        return pack_taps(self.weight), self.bias.detach().float()


class FaViTBlock(favit.Block):
    """Attention and MLP add their shortcuts, the MLP takes its norm."""

    needs: ClassVar = {"attn": FastFactorizedAttention, "mlp": FastDWMlp}

    def forward(self, x: Tensor) -> Tensor:
        x = self.attn(self.norm1(x), x)
        return self.mlp(x, x, self.norm2)


class RAVLTConvMlp(NormedMlp, ravlt.ConvMlp):
    """(B, H, W, dim) → (B, H, W, dim)."""

    followed: ClassVar = {"act": ("fc1",)}
    needs: ClassVar = {"fc2": FastLinear}

    def in_layers(self, x: Tensor, residual: Tensor | None) -> Tensor:
        x = self.act(self.fc1(x)).permute(0, 3, 1, 2)
        return self.fc2(self.dwconv(x).permute(0, 2, 3, 1), residual)

    def conv(self) -> nn.Module:
        return self.dwconv


class RAVLTBlock(ravlt.Block):
    """Attention and MLP add their shortcuts, the MLP takes its norm."""

    needs: ClassVar[dict[str, Any]] = {"attn": FastRankAugmentedAttention, "mlp": RAVLTConvMlp}

    def forward(self, x: Tensor, sin: Tensor | None, cos: Tensor | None) -> Tensor:
        x = self.pos(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        rotary = None if sin is None or cos is None else (sin, cos)
        x = self.attn(self.norm1(x), rotary, x)
        return self.mlp(x, x, self.norm2)


class RAVLTStage(Recorded, ravlt.RAVLTStage):
    """Without the table of rotations where the attention keeps its own."""

    needs: ClassVar = {"blocks": RAVLTBlock}

    def compute(self, x: Tensor) -> Tensor:
        if not runs_fast(x, next(self.parameters())):
            return super().compute(x)
        x = self.downsample(x).permute(0, 2, 3, 1)
        return self.run_blocks(x, None, None).permute(0, 3, 1, 2)


class MedViTV2ConvFFN(medvitv2_blocks.ConvFFN):
    """The last layer applies the gates and, if its scale is given, adds the shortcut."""

    needs: ClassVar = {"se": FastSqueezeExcite, "project": FastPointwiseConv2d}

    def forward(self, x: Tensor, residual_scale: Tensor | None = None) -> Tensor:
        se: Any = self.se
        hidden = self.dwconv(self.expand(x))
        residual = None if residual_scale is None else x
        return self.project(hidden, residual, se.gates(hidden), residual_scale)


class MedViTV2LocalBlock(FastLayer, medvitv2_blocks.FoldedLocalBlock):
    """Planes are made with the norm; the feed-forward adds both of its shortcuts."""

    needs: ClassVar = {"norm1": nn.BatchNorm2d, "ffn": MedViTV2ConvFFN}

    def forward(self, x: Tensor) -> Tensor:
        derived = self.derived(x)
        if derived is None:
            return super().forward(x)
        affine, residual_scale = derived
        return self.ffn(_add_as_stored(self.attn, x, self.norm1, affine), residual_scale)

    def sources(self) -> list[Tensor]:
        return [self.scale, *_tensors_of(self.norm1)]

    def derive(self, x: Tensor) -> tuple[Tensor | None, Tensor]:
        return _affine(self.norm1, x), 1 + self.scale.detach().float()


class MedViTV2GlobalBlock(FastLayer, medvitv2_blocks.GlobalBlock):
    """Planes are made with the second norm."""

    needs: ClassVar = {"norm2": nn.BatchNorm2d}

    def forward(self, x: Tensor) -> Tensor:
        derived = self.derived(x)
        if derived is None:
            return super().forward(x)
        return _add_as_stored(self.kan, self.mix(x), self.norm2, *derived)

    def sources(self) -> list[Tensor]:
        return _tensors_of(self.norm2)

    def derive(self, x: Tensor) -> tuple[Tensor | None]:
        return (_affine(self.norm2, x),)


def _tensors_of(norm: nn.BatchNorm2d) -> list[Tensor]:
    return [t for t in norm.state_dict(keep_vars=True).values() if t.is_floating_point()]


def _affine(norm: nn.BatchNorm2d, x: Tensor) -> Tensor | None:
    """Scale and shift (2, C) in float32, or None where there is no kernel for them."""
    if split_planes.unsupported(x.device, x.dtype) is not None:
        return None
    return torch.stack([t.detach() for t in norm_affine(copy.deepcopy(norm).float())])


def _add_as_stored(
    layer: nn.Module, x: Tensor, norm: nn.BatchNorm2d, affine: Tensor | None
) -> Tensor:
    """``x`` and what a layer makes of its norm, see :func:`medvitv2_blocks.map_as_stored`."""
    if affine is None:
        return x + medvitv2_blocks.map_as_stored(layer, norm(x))
    batch, dim, height, width = x.shape
    mixed = layer(split_planes(x, affine).view(batch, height, width, dim))
    return join_planes(mixed.reshape(x.shape), x)


FORMS: dict[type[Any], type[Any]] = {
    biformer.Block: BiFormerBlock,
    biformer.GlobalAttention: BiFormerGlobalAttention,
    favit.Block: FaViTBlock,
    favit.FaViTStage: recorded_form(favit.FaViTStage),
    hat_blocks.ChannelAttentionConv: HATChannelAttentionConv,
    hat_blocks.HybridBlock: HATHybridBlock,
    hat_blocks.OverlapBlock: HATOverlapBlock,
    hat_blocks.ResidualGroup: HATResidualGroup,
    litv2.Block: LITv2Block,
    litv2.DeformableConv2d: LITv2DeformableConv2d,
    litv2.LITv2Stage: recorded_form(litv2.LITv2Stage),
    litv2.PatchEmbed: LITv2PatchEmbed,
    medvitv2_blocks.ConvFFN: MedViTV2ConvFFN,
    medvitv2_blocks.FoldedLocalBlock: MedViTV2LocalBlock,
    medvitv2_blocks.GlobalBlock: MedViTV2GlobalBlock,
    ravlt.Block: RAVLTBlock,
    ravlt.ConvMlp: RAVLTConvMlp,
    ravlt.RAVLTStage: RAVLTStage,
}
