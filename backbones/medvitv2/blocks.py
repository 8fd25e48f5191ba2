"""The blocks of MedViTV2: neighborhood attention, and global attention with a KAN.

Omid Nejati Manzari et al., "Medical Image Classification with KAN-Integrated Transformers and
Dilated Neighborhood Attention", https://arxiv.org/abs/2502.13693; :mod:`backbones.medvitv2` has the
network, and documents where they follow the published code instead of the paper.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from timm.layers import DropPath, SqueezeExcite, make_divisible
from torch import Tensor, nn

from ops.attention.pooled import PooledAttention
from ops.batch_norm import BatchNorm2d
from ops.conv import ConvNorm
from ops.cpu.layout.nchw import nchw_from_nhwc, nhwc_from_nchw
from ops.inference.layers import FastForm, stands_for
from ops.kan import KAN
from ops.neighborhood import NeighborhoodAttention2D
from ops.reparam import fold_norm_after, fold_norm_before, fold_scale_after, norm_affine
from ops.rewriting.lift import affine_of


class ConvFFN(nn.Module):
    """Expand, depthwise, squeeze-and-excitation, project: (B, dim, H, W) → (B, dim, H, W)."""

    def __init__(self, dim: int, hidden_dim: int, kernel_size: int = 3) -> None:
        super().__init__()
        self.expand = ConvNorm(dim, hidden_dim, act_layer=nn.Hardswish)
        self.dwconv = ConvNorm(
            hidden_dim, hidden_dim, kernel_size, groups=hidden_dim, act_layer=nn.Hardswish
        )
        self.se = SqueezeExcite(
            hidden_dim, rd_channels=hidden_dim // dim, gate_layer="hard_sigmoid"
        )
        self.project: nn.Module = ConvNorm(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(self.se(self.dwconv(self.expand(x))))


def apply_reinterpreted(layer: nn.Module, x: Tensor) -> Tensor:
    """(B, dim, H, W) → (B, dim, H, W), whose memory is reinterpreted as (B, H, W, dim)."""
    batch, dim, height, width = x.shape
    mixed: Tensor = layer(x.reshape(batch, height, width, dim))
    return mixed.reshape(x.shape)


class LocalBlock(nn.Module):
    """Neighborhood attention, then a convolutional feed-forward, on (B, dim, H, W)."""

    def __init__(
        self, dim: int, head_dim: int, window_size: int, dilation: int, ffn_kernel: int, drop: float
    ) -> None:
        super().__init__()
        self.norm1 = BatchNorm2d(dim)
        self.attn = NeighborhoodAttention2D(
            dim,
            dim // head_dim,
            window_size,
            dilation=dilation,
            rel_pos_bias=True,
            small_maps="shrink",
        )
        self.drop_path = DropPath(drop)
        self.norm2 = BatchNorm2d(dim)
        self.ffn = ConvFFN(dim, 3 * dim, ffn_kernel)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(apply_reinterpreted(self.attn, self.norm1(x)))
        normed = self.norm2(x)
        return x + normed + self.ffn(normed)

    def fuse(self) -> nn.Module:
        """Fold the second norm into the feed-forward; see :class:`FoldedLocalBlock`."""
        return FoldedLocalBlock(self) if isinstance(self.norm2, nn.BatchNorm2d) else self


class FoldedLocalBlock(nn.Module):
    """A local block in eval mode with its second norm folded, on (B, dim, H, W).

    The norm is also on a shortcut: with ``n = norm2(x)``, ``x + n + ffn(n)`` becomes
    ``x + scale * x + folded_ffn(x)``.
    """

    def __init__(self, block: LocalBlock) -> None:
        super().__init__()
        scale, shift = norm_affine(block.norm2)
        self.norm1, self.attn, self.ffn = block.norm1, block.attn, block.ffn
        expand, project = self.ffn.expand, self.ffn.project
        assert isinstance(project, ConvNorm)
        expand.conv = fold_norm_before(block.norm2, expand.conv)
        self.ffn.project = fold_scale_after(
            fold_norm_after(project.conv, project.norm), torch.ones_like(scale), shift.detach()
        )
        self.scale = nn.Parameter(scale.detach())

    def forward(self, x: Tensor) -> Tensor:
        x = x + apply_reinterpreted(self.attn, self.norm1(x))
        return x + self.scale.view(1, -1, 1, 1) * x + self.ffn(x)


@stands_for(FoldedLocalBlock)
class MedViTV2LocalBlock(FastForm, FoldedLocalBlock):
    """The inference form: the norm converts to NCHW."""

    kernels: ClassVar = (nchw_from_nhwc,)

    def fast(self, x: Tensor, derived: Tensor) -> Tensor:
        x = _add_reinterpreted(self.attn, x, derived)
        return x + self.scale.view(1, -1, 1, 1) * x + self.ffn(x)

    def derive(self, x: Tensor) -> Tensor:
        return torch.stack(affine_of(self.norm1))


class GroupedConv(nn.Module):
    """Multi-head convolutional attention: grouped 3×3 and pointwise, on (B, dim, H, W)."""

    def __init__(self, dim: int, head_dim: int) -> None:
        super().__init__()
        self.conv = ConvNorm(dim, dim, 3, groups=dim // head_dim, act_layer=nn.ReLU)
        self.proj = nn.Conv2d(dim, dim, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.conv(x))


class GlobalBlock(nn.Module):
    """Pooled attention, concatenated with a convolution of its output, then a KAN.

    (B, in_dim, H, W) → (B, dim, H, W); a fraction ``mix_ratio`` of the channels is for attention.
    """

    def __init__(
        self,
        in_dim: int,
        dim: int,
        head_dim: int,
        sr_ratio: int,
        mix_ratio: float,
        drop: float,
        *,
        project_input: bool,
    ) -> None:
        super().__init__()
        attn_dim = make_divisible(int(dim * mix_ratio), 32)
        conv_dim = dim - attn_dim
        if conv_dim < head_dim or conv_dim % head_dim or attn_dim % head_dim:
            raise ValueError(
                f"head_dim {head_dim} does not divide {dim} channels split into {attn_dim} for "
                f"attention and {conv_dim} for convolution (mix_ratio {mix_ratio})"
            )
        self.embed = (
            ConvNorm(in_dim, attn_dim) if project_input or in_dim != attn_dim else nn.Identity()
        )
        self.norm1: nn.Module = BatchNorm2d(attn_dim)
        self.attn = PooledAttention(attn_dim, attn_dim // head_dim, sr_ratio)
        self.attn_drop_path = DropPath(drop * mix_ratio)
        self.proj = ConvNorm(attn_dim, conv_dim) if conv_dim != attn_dim else nn.Identity()
        self.conv = GroupedConv(conv_dim, head_dim)
        self.conv_drop_path = DropPath(drop * (1 - mix_ratio))
        self.norm2 = BatchNorm2d(dim)
        # In the checkpoints, but unused. Frozen, so that data-parallel training does not wait for
        # its gradients.
        self.unused: nn.Module = ConvFFN(dim, 2 * dim).requires_grad_(False)
        self.kan = KAN((dim, 2 * dim, dim))
        self.drop_path = DropPath(drop)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mix(x)
        return x + self.drop_path(apply_reinterpreted(self.kan, self.norm2(x)))

    def mix(self, x: Tensor) -> Tensor:
        """Concatenated attention and convolution: (B, in_dim, H, W) → (B, dim, H, W)."""
        x = self.embed(x)
        mixed = self.attn(self.norm1(x).flatten(2).transpose(1, 2))
        x = x + self.attn_drop_path(mixed.transpose(1, 2).reshape(x.shape))
        beside = self.proj(x)
        beside = beside + self.conv_drop_path(self.conv(beside))
        return torch.cat((x, beside), dim=1)

    def fuse(self) -> nn.Module:
        """Fold the first norm into the attention and remove unused layers."""
        if isinstance(self.norm1, nn.BatchNorm2d):
            self.attn.fold_norm(self.norm1)
            self.norm1 = nn.Identity()
            self.unused = nn.Identity()
        return self


@stands_for(GlobalBlock)
class MedViTV2GlobalBlock(FastForm, GlobalBlock):
    """The inference form: the second norm converts to NCHW."""

    kernels: ClassVar = (nchw_from_nhwc,)

    def fast(self, x: Tensor, derived: Tensor) -> Tensor:
        return _add_reinterpreted(self.kan, self.mix(x), derived)

    def derive(self, x: Tensor) -> Tensor:
        return torch.stack(affine_of(self.norm2))


def _add_reinterpreted(layer: nn.Module, x: Tensor, affine: Tensor) -> Tensor:
    """``x`` plus a layer applied to its norm, see :func:`apply_reinterpreted`."""
    batch, dim, height, width = x.shape
    mixed = layer(nchw_from_nhwc(x, affine).view(batch, height, width, dim))
    return nhwc_from_nchw(mixed.reshape(x.shape), x)
