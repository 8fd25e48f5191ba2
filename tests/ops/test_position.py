"""The convolutional position term and its fused form."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ops.position import ConvPosition


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
