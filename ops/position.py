"""Position, told by a convolution or by a table.

A depthwise 3×3 sees its neighbours and the border: "Conditional Positional Encodings for Vision
Transformers", https://arxiv.org/abs/2102.10882.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ops.reparam import fold_scale_after

__all__ = ["ConvPosition", "resize_table"]


def resize_table(table: Tensor, height: int, width: int) -> Tensor:
    """(C, h, w) → (C, height, width), bicubically; the same tensor if it fits."""
    # To interpolate to the same size changes nothing; a symbolic size is not compared.
    if all(
        statically_known_true(n == m) for n, m in zip(table.shape[1:], (height, width), strict=True)
    ):
        return table
    exact = table.to(torch.promote_types(table.dtype, torch.float32)).unsqueeze(0)
    resized = F.interpolate(exact, size=(height, width), mode="bicubic")
    return resized.squeeze(0).to(table.dtype)


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
