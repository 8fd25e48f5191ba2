"""Position told by a convolution: what a depthwise 3×3 sees of its neighbours and the border.

Of "Conditional Positional Encodings for Vision Transformers", https://arxiv.org/abs/2102.10882.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ops.reparam import fold_scale_after

__all__ = ["ConvPosition"]


class ConvPosition(nn.Module):
    """``x + conv(x)`` with a depthwise convolution; fuses into one convolution.

    (B, dim, H, W) → (B, dim, H, W).

    Raises:
        ValueError: an even kernel, which would shift the map.
    """

    def __init__(self, dim: int, kernel_size: int = 3) -> None:
        super().__init__()
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {kernel_size}")
        self.conv = nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x)

    @torch.no_grad()
    def fuse(self) -> nn.Module:
        """A depthwise convolution whose centre tap carries the identity."""
        conv = fold_scale_after(self.conv, torch.ones_like(self.conv.weight[:, 0, 0, 0]))
        centre = conv.kernel_size[0] // 2
        conv.weight[:, 0, centre, centre] += 1
        return conv
