"""Shared convolutions: shapes, fusing, errors, and the Inception branches."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from zoo import randomise

from ops.conv import ConvNorm, ConvResidual, InceptionDWConv2d, NormLinear


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dilation", [1, 3])
@torch.no_grad()
def test_conv_norm(stride: int, dilation: int) -> None:
    layer = ConvNorm(4, 6, 5, stride, dilation=dilation, act_layer=nn.ReLU)
    randomise(layer).eval()
    x = torch.randn(2, 4, 17, 20)
    expected = layer(x)
    assert expected.shape == (2, 6, -(-17 // stride), -(-20 // stride))
    torch.testing.assert_close(layer.fuse()(x), expected)
    assert isinstance(ConvNorm(4, 6).fuse(), nn.Conv2d)


@torch.no_grad()
def test_residual_becomes_one_convolution() -> None:
    layer = ConvResidual(4, 3)
    x = torch.randn(2, 4, 5, 5)
    assert torch.equal(layer.eval()(x), x)
    randomise(layer)
    expected = layer(x)
    fused = layer.fuse()
    assert isinstance(fused, nn.Conv2d)
    torch.testing.assert_close(fused(x), expected)
    torch.testing.assert_close(layer(x), expected)


@torch.no_grad()
def test_norm_linear() -> None:
    layer = randomise(NormLinear(4, 3)).eval()
    x = torch.randn(2, 4)
    torch.testing.assert_close(layer.fuse()(x), layer(x))


@torch.no_grad()
def test_inception_branches_are_those_of_the_paper() -> None:
    layer = InceptionDWConv2d(16, band_kernel_size=11, branch_ratio=0.125).double()
    x = torch.randn(2, 16, 9, 13, dtype=torch.float64)
    out = layer(x)
    assert torch.equal(out[:, :10], x[:, :10])
    # A band is an 11×11 kernel that is zero but for its middle row or column.
    for conv, first, axis in ((layer.dwconv_w, 12, 2), (layer.dwconv_h, 14, 3)):
        kernel = torch.zeros(2, 1, 11, 11, dtype=torch.float64)
        kernel.select(axis, 5).copy_(conv.weight.squeeze(axis))
        full = nn.functional.conv2d(x[:, first : first + 2], kernel, conv.bias, padding=5, groups=2)
        torch.testing.assert_close(out[:, first : first + 2], full)


def test_inception_errors() -> None:
    with pytest.raises(ValueError, match="must be odd.*10"):
        InceptionDWConv2d(16, band_kernel_size=10)
    for ratio in (0.01, 0.4):
        with pytest.raises(ValueError, match=f"branch_ratio {ratio}"):
            InceptionDWConv2d(16, branch_ratio=ratio)
