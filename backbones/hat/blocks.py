"""The blocks of HAT: window attention, overlapping cross-attention and channel attention.

Xiangyu Chen et al., "Activating More Pixels in Image Super-Resolution Transformer",
https://arxiv.org/abs/2205.04437; :mod:`backbones.hat` has the network around them.
"""

from __future__ import annotations

from collections.abc import Sequence

from timm.layers import DropPath, Mlp, SqueezeExcite
from torch import Tensor, nn

from backbones.core.stage import Stage
from ops.attention.window import (
    OverlappingWindowAttention,
    WindowAttention,
    overlap_position_index,
    relative_position_index,
    shift_masks,
)

__all__ = ["HybridBlock", "OverlapBlock", "ResidualGroup"]

# Weight of the channel branch.
CONV_SCALE = 0.01


class ChannelAttentionConv(nn.Module):
    """Two 3×3 convolutions with a bottleneck, followed by channel attention.

    (B, dim, H, W) → (B, dim, H, W).

    Args:
        compress_ratio, squeeze_factor: reduction of the width in the bottleneck and in the gate.
    """

    def __init__(self, dim: int, compress_ratio: int, squeeze_factor: int) -> None:
        super().__init__()
        if dim < max(compress_ratio, squeeze_factor):
            raise ValueError(
                f"compress_ratio {compress_ratio} and squeeze_factor {squeeze_factor} must be at "
                f"most dim {dim}"
            )
        self.conv1 = nn.Conv2d(dim, dim // compress_ratio, 3, padding=1)
        self.act = nn.GELU()
        self.conv2 = nn.Conv2d(dim // compress_ratio, dim, 3, padding=1)
        self.se = SqueezeExcite(dim, rd_channels=dim // squeeze_factor)

    def forward(self, x: Tensor) -> Tensor:
        return self.se(self.conv2(self.act(self.conv1(x))))


class HybridBlock(nn.Module):
    """Parallel window and channel attention, then MLP: (B, H, W, dim) → (B, H, W, dim)."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int,
        shift_size: int,
        compress_ratio: int,
        squeeze_factor: int,
        mlp_ratio: float,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, window_size, num_heads, shift_size)
        self.conv = ChannelAttentionConv(dim, compress_ratio, squeeze_factor)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, index: Tensor, masks: Tensor, overlap_index: Tensor) -> Tensor:
        normed = self.norm1(x)
        gated = self.conv(normed.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        x = x + self.drop_path(self.attn(normed, index, masks)) + gated * CONV_SCALE
        return x + self.drop_path(self.mlp(self.norm2(x)))


class OverlapBlock(nn.Module):
    """Attention to overlapping windows, then MLP: (B, H, W, dim) → (B, H, W, dim)."""

    def __init__(
        self, dim: int, num_heads: int, window_size: int, overlap_ratio: float, mlp_ratio: float
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = OverlappingWindowAttention(dim, window_size, num_heads, overlap_ratio)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor, index: Tensor, masks: Tensor, overlap_index: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x), overlap_index)
        return x + self.mlp(self.norm2(x))


class ResidualGroup(Stage):
    """Hybrid blocks, an overlap block and a 3×3 convolution, with a shortcut."""

    def __init__(
        self, blocks: Sequence[HybridBlock], overlap_block: OverlapBlock, dim: int
    ) -> None:
        super().__init__([*blocks, overlap_block])
        self.conv = nn.Conv2d(dim, dim, 3, padding=1)
        self.window_size = overlap_block.attn.window_size
        self.overlap_size = overlap_block.attn.overlap_size

    def forward(self, x: Tensor) -> Tensor:
        size, device = self.window_size, x.device
        deep = self.run_blocks(
            x.permute(0, 2, 3, 1),
            relative_position_index(size, device).flatten(),
            shift_masks(size, size // 2, x.dtype, device),
            overlap_position_index(size, self.overlap_size, device).flatten(),
        )
        return x + self.conv(deep.permute(0, 3, 1, 2))
