"""Inference forms of neighborhood attention against the plain layers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from zoo import randomise

from ops.inference.conversion import to_channels_last
from ops.inference.neighborhood import (
    FastMapAttention,
    FastNeighborhoodAttention2D,
)
from ops.neighborhood import NeighborhoodAttention2D
from ops.neighborhood.block import MapAttention, NeighborhoodBlock

SIZES = [(9, 12), (14, 14), (3, 10), (2, 3)]  # kernel · dilation is 6


def attention(small_maps: str) -> NeighborhoodAttention2D:
    return NeighborhoodAttention2D(
        32, 2, 3, dilation=2, rel_pos_bias=True, small_maps=small_maps
    ).eval()


def tokens(*size: int) -> Tensor:
    return torch.randn(2, *size, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("small_maps", ["pad", "shrink"])
@torch.no_grad()
def test_attention(small_maps: str) -> None:
    plain = randomise(attention(small_maps))
    fast = nn.Sequential(copy.deepcopy(plain))
    to_channels_last(fast, always=False)
    assert type(fast[0]) is FastNeighborhoodAttention2D
    for size in SIZES:
        x = tokens(*size)
        torch.testing.assert_close(fast[0](x), plain(x), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_bias_is_converted_once_and_follows_changes() -> None:
    fast = nn.Sequential(randomise(attention("pad")).bfloat16())
    to_channels_last(fast, always=False)
    layer, x = fast[0], tokens(9, 12).bfloat16()
    before, bias = layer(x), layer.window((9, 12))[3]
    assert bias.dtype == torch.float32
    assert layer.window((9, 12))[3] is bias
    layer.rpb[:, 2, 2] += 8  # every query looks at itself
    after = layer(x)
    assert torch.equal(layer.window((9, 12))[3], layer.rpb.float())
    assert (after - before).abs().max() > 0.1
    layer.float()
    assert layer.window((9, 12))[3].dtype == torch.float32
    torch.testing.assert_close(layer(x.float()), after.float(), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("of_all", [False, True])
@torch.no_grad()
def test_block(of_all: bool) -> None:
    attn = MapAttention(32, 2, 9) if of_all else attention("pad")
    plain = randomise(NeighborhoodBlock(attn, 2, 0.0, 0.0)).eval()
    fast = nn.Sequential(copy.deepcopy(plain))
    to_channels_last(fast, always=False)
    block = fast[0]
    assert isinstance(block.attn, FastNeighborhoodAttention2D)
    assert isinstance(block.attn, FastMapAttention) == of_all
    for size in SIZES:
        x = tokens(*size)
        torch.testing.assert_close(fast(x), plain(x), rtol=1e-4, atol=1e-5)
