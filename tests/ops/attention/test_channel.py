"""Efficient channel attention."""

from __future__ import annotations

import pytest
import torch
from timm.layers import EcaModule

from ops.attention.channel import EfficientChannelAttention


@pytest.mark.parametrize("kernel_size", [1, 3, 7])
@pytest.mark.parametrize("shape", [(2, 5, 3, 4), (1, 2, 1, 1)])
def test_as_timm(kernel_size: int, shape: tuple[int, ...]) -> None:
    layer, timms = EfficientChannelAttention(kernel_size), EcaModule(kernel_size=kernel_size)
    layer.load_state_dict(timms.state_dict())
    x = torch.randn(shape)
    for taken in (x, x.contiguous(memory_format=torch.channels_last)):
        torch.testing.assert_close(layer(taken), timms(x))


def test_no_images() -> None:
    assert EfficientChannelAttention()(torch.zeros(0, 4, 5, 5)).shape == (0, 4, 5, 5)


def test_gates_in_half_precision() -> None:
    """Only the means and the gates are rounded."""
    layer = EfficientChannelAttention().bfloat16()
    x = torch.randn(2, 32, 6, 6).bfloat16()
    exact = layer.double()(x.double())
    error = (layer.bfloat16()(x).double() - exact).abs()
    assert (error <= exact.abs() * 2**-6 + 1e-3).all()


def test_even_kernels_are_refused() -> None:
    with pytest.raises(ValueError, match="kernel_size must be odd, got 4"):
        EfficientChannelAttention(4)
