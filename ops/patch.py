"""Patch embedding and patch merging."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import Tensor, nn

__all__ = ["ConvLayerNorm", "PatchEmbed", "PatchMerging"]


class ConvLayerNorm(nn.Module):
    """A strided convolution and a layer norm; by default, 3×3 and of stride 2.

    (B, in_chs, H, W) → (B, dim, ⌈H/2⌉, ⌈W/2⌉). Without ``padding``, incomplete patches are dropped.
    """

    def __init__(
        self, in_chs: int, dim: int, kernel_size: int = 3, stride: int = 2, padding: int = 1
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_chs, dim, kernel_size, stride, padding)
        self.norm = LayerNorm2d(dim, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


class PatchEmbed(nn.Module):
    """Patch embedding and norm: (B, in_chs, H, W) → (B, dim, ⌈H / patch_size⌉, ⌈W / patch_size⌉).

    Incomplete patches at the right and bottom are zero-padded.
    """

    def __init__(self, in_chs: int, dim: int, patch_size: int = 4) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.conv = nn.Conv2d(in_chs, dim, patch_size, patch_size)
        self.norm = LayerNorm2d(dim, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, -x.shape[3] % self.patch_size, 0, -x.shape[2] % self.patch_size))
        return self.norm(self.conv(x))


class PatchMerging(nn.Module):
    """Concatenate the four tokens of each 2×2 square, normalise and project.

    Of Swin Transformer, https://arxiv.org/abs/2103.14030. (B, dim, H, W) → (B, out_dim, ⌈H/2⌉,
    ⌈W/2⌉); odd sides are zero-padded.
    """

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim, eps=1e-5)
        self.reduction = nn.Linear(4 * dim, out_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        if not (_is_even(x.shape[1]) and _is_even(x.shape[2])):
            x = F.pad(x, (0, 0, 0, -x.shape[2] % 2, 0, -x.shape[1] % 2))
        # In the order (0, 0), (1, 0), (0, 1), (1, 1).
        squares = [x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]
        return self.reduction(self.norm(torch.cat(squares, dim=-1))).permute(0, 3, 1, 2)


def _is_even(size: Any) -> bool:
    return isinstance(size, int) and size % 2 == 0
