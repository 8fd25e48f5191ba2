"""Position encodings by a convolution or a learned table.

:class:`ConvPosition` uses a depthwise 3×3 convolution, of "Conditional Positional Encodings for
Vision Transformers", https://arxiv.org/abs/2102.10882.
:class:`PositionTable` is the learned table of the first vision transformers,
https://arxiv.org/abs/2010.11929, interpolated for other sizes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.nn import functional as F

from ops.arguments import checked
from ops.reparam import fold_scale_after

__all__ = ["ConvPosition", "PositionTable", "resize_position_table"]


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
        """A depthwise convolution whose centre tap includes the identity."""
        conv = fold_scale_after(self.conv, torch.ones_like(self.conv.weight[:, 0, 0, 0]))
        centre = conv.kernel_size[0] // 2
        conv.weight[:, 0, centre, centre] += 1
        return conv


class PositionTable(nn.Module):
    """``x + table``: a learned vector for each pixel of a square map, interpolated for other maps.

    (B, dim, h, w) → (B, dim, h, w).

    Args:
        dim: channels.
        side: of the map that the table is for; 14 for images of 224 pixels at stride 16.
        std: of the truncated normal initialisation; 0 for zeros.
    """

    def __init__(self, dim: int, side: int, std: float = 0.02) -> None:
        super().__init__()
        self.pos_embed = nn.Parameter(torch.zeros(1, side**2, dim))
        if std:
            trunc_normal_(self.pos_embed, std=std)

    def forward(self, x: Tensor) -> Tensor:
        table = resize_position_table(self.pos_embed, x.shape[2:])  # (1, h * w, dim)
        return x + table.transpose(1, 2).unflatten(2, x.shape[2:])


@checked(ranks={"table": 3})
def resize_position_table(table: Tensor, size: Sequence[int]) -> Tensor:
    """Resize a row-major table (1, n², dim) to (1, h · w, dim) bicubically, if necessary.

    As in the published transformers: ``align_corners=False``, no antialiasing, computed in float32
    or higher.

    Raises:
        ValueError: the table is not square.
    """
    side = round(table.shape[1] ** 0.5)
    if side**2 != table.shape[1]:
        raise ValueError(f"a position table must have n² entries, got {table.shape[1]}")
    # Interpolation to the same size is the identity, so symbolic sizes need no comparison.
    if all(statically_known_true(n == side) for n in size):
        return table
    square = table.to(torch.promote_types(table.dtype, torch.float32))
    square = square.transpose(1, 2).unflatten(2, (side, side))  # (1, dim, n, n)
    resized = F.interpolate(square, size=tuple(size), mode="bicubic", align_corners=False)
    return resized.flatten(2).transpose(1, 2).to(table.dtype)
