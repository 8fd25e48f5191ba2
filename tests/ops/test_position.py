"""Positions: the convolutional term and its fused form, and tables."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ops.position import ConvPosition, PositionTable, resize_position_table


@pytest.mark.parametrize("kernel_size", [1, 3, 5])
@torch.no_grad()
def test_fuses_into_one_convolution(kernel_size: int) -> None:
    torch.manual_seed(0)
    layer = ConvPosition(6, kernel_size)
    x = torch.randn(2, 6, 7, 4)
    before = layer.conv.weight.clone()
    expected = x + layer.conv(x)
    torch.testing.assert_close(layer(x), expected)
    fused = layer.fuse()
    assert isinstance(fused, nn.Conv2d)
    torch.testing.assert_close(fused(x), expected)
    assert torch.equal(layer.conv.weight, before)


def test_even_kernels_are_refused() -> None:
    with pytest.raises(ValueError, match="odd, got 2"):
        ConvPosition(4, 2)


@torch.no_grad()
def test_a_table_is_added_row_by_row() -> None:
    torch.manual_seed(0)
    layer = PositionTable(3, 4)
    x = torch.randn(2, 3, 4, 4)
    added = layer(x) - x
    for row, column in ((0, 0), (1, 2), (3, 3)):
        vector = layer.pos_embed[0, 4 * row + column]
        torch.testing.assert_close(added[:, :, row, column], vector.expand(2, 3))
    assert resize_position_table(layer.pos_embed, (4, 4)) is layer.pos_embed
    assert PositionTable(3, 2, std=0).pos_embed.abs().max() == 0


@pytest.mark.parametrize("size", [(8, 8), (2, 8), (3, 1)])
@torch.no_grad()
def test_a_table_is_interpolated(size: tuple[int, int]) -> None:
    """Also where another shape has as many pixels."""
    torch.manual_seed(0)
    table = torch.randn(1, 16, 3)
    square = table.reshape(1, 4, 4, 3).permute(0, 3, 1, 2)
    expected = F.interpolate(square, size, mode="bicubic", align_corners=False, antialias=False)
    resized = resize_position_table(table, size)
    torch.testing.assert_close(resized, expected.flatten(2).transpose(1, 2))
    half = resize_position_table(table.bfloat16(), size)
    assert half.dtype == torch.bfloat16
    exact = resize_position_table(table.bfloat16().float(), size)
    assert torch.equal(half, exact.bfloat16())


def test_only_squares_have_tables() -> None:
    with pytest.raises(ValueError, match="n² entries, got 15"):
        resize_position_table(torch.zeros(1, 15, 2), (4, 4))
