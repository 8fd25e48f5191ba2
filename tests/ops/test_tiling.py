"""Tiled inference, with networks of known receptive field."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ops.tiling import Tile, run_tiled, tile_spans


def grow(x: Tensor) -> Tensor:
    """Twice the size, and sees one pixel around: what lies beyond the image is zero."""
    kernel = torch.arange(1.0, 10.0, dtype=x.dtype).view(1, 1, 3, 3)
    near = F.conv2d(x.flatten(0, 1).unsqueeze(1), kernel, padding=1).view(x.shape)
    return near.repeat_interleave(2, 2).repeat_interleave(2, 3)


def images(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_spans() -> None:
    assert tile_spans(10, 4, 2) == [Tile(0, 4, 0, 6), Tile(4, 8, 2, 10), Tile(8, 10, 6, 10)]
    assert tile_spans(4, 8, 3) == [Tile(0, 4, 0, 4)]


@given(
    height=st.integers(1, 20),
    width=st.integers(1, 20),
    tile_size=st.integers(1, 9),
    overlap=st.integers(1, 4),
    data=st.data(),
)
@settings(max_examples=50, deadline=None)
def test_equals_the_whole(
    height: int, width: int, tile_size: int, overlap: int, data: st.DataObject
) -> None:
    """Tiles that read as far as the network sees change nothing, however they are blended."""
    blend = data.draw(st.integers(0, min(overlap - 1, tile_size // 2)))
    x = images(2, 3, height, width)
    tiled = run_tiled(grow, x, tile_size=tile_size, overlap=overlap, scale=2, blend=blend)
    torch.testing.assert_close(tiled, grow(x))


def test_hard_seams() -> None:
    """Each tile is filled with its own number."""
    numbers = iter(range(1, 100))

    def number(x: Tensor) -> Tensor:
        return torch.full_like(x, next(numbers))

    tiled = run_tiled(number, images(1, 1, 5, 6), tile_size=3, overlap=2)
    assert tiled[0, 0].tolist() == [[1] * 3 + [2] * 3] * 3 + [[3] * 3 + [4] * 3] * 2


def test_blended_seams() -> None:
    numbers = iter((0.0, 1.0))

    def number(x: Tensor) -> Tensor:
        return torch.full_like(x, next(numbers))

    tiled = run_tiled(number, images(1, 1, 1, 8), tile_size=4, overlap=2, blend=2)
    assert tiled.flatten().tolist() == [0, 0, 0.125, 0.375, 0.625, 0.875, 1, 1]


def test_other_channels_and_types() -> None:
    def grey(x: Tensor) -> Tensor:
        return x.mean(1, keepdim=True).bfloat16()

    tiled = run_tiled(grey, images(1, 3, 7, 9), tile_size=4, overlap=2, blend=1)
    assert tiled.shape == (1, 1, 7, 9) and tiled.dtype == torch.bfloat16


def test_bad_arguments_are_named() -> None:
    x = images(1, 1, 8, 8)
    with pytest.raises(ValueError, match="tile_size must be 1 or more, got 0"):
        run_tiled(grow, x, tile_size=0, overlap=2)
    with pytest.raises(ValueError, match=r"blend must be in 0 … 2 .* got 3"):
        run_tiled(grow, x, tile_size=4, overlap=3, blend=3)
    with pytest.raises(ValueError, match="scale 3 a tile should become 18×18, but .* made 12×12"):
        run_tiled(grow, x, tile_size=4, overlap=2, scale=3)
    with pytest.raises(ValueError, match="0×8 has no pixels"):
        run_tiled(grow, x[:, :, :0], tile_size=4, overlap=2)
