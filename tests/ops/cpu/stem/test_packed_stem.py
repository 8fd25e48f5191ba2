"""Stems in one pass against their layers in float64; bad arguments."""

from __future__ import annotations

import copy

import pytest
import torch
from compiled_kernels import PLAIN_ACTIVATIONS, conv_row, random, using_threads
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ops.cpu.activations import ACTIVATIONS
from ops.cpu.stem.packed_stem import pack_layers, packed_stem


def _agrees(
    x: Tensor,
    convs: list[nn.Conv2d],
    activation: str,
    window: tuple[int, int, int] = (3, 2, 1),
) -> None:
    """In bfloat16, only maps between the layers, weights and results are rounded."""
    if packed_stem.unavailable(x.device, x.dtype) is not None:
        with pytest.raises(RuntimeError, match="bfloat16"):
            packed_stem(x, *pack_layers(convs, x.dtype), [activation] * len(convs), window=window)
        return
    expected = x.double()
    with torch.no_grad():
        packed = pack_layers([conv.to(x.dtype) for conv in convs], x.dtype)
        out = packed_stem(x, *packed, [activation] * len(convs), window=window)
        for conv in convs:
            expected = PLAIN_ACTIVATIONS[activation](copy.deepcopy(conv).double()(expected))
    assert out.shape == expected.shape and out.dtype == x.dtype
    assert out.is_contiguous(memory_format=torch.channels_last)
    tolerance = 1e-5 if x.dtype == torch.float32 else 0.02
    assert (out - expected).abs().max() < tolerance * (1 + expected.abs().max())


@settings(max_examples=140)
@given(
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    batch=st.integers(1, 3),
    more=st.tuples(st.integers(0, 40), st.integers(0, 70)),
    image_channels=st.integers(1, 5),
    channels=st.lists(st.sampled_from([1, 5, 8, 10, 17, 40]), min_size=1, max_size=4),
    activation=st.sampled_from(ACTIVATIONS),
    bias=st.booleans(),
    window=st.just((3, 2, 1))
    | st.tuples(st.integers(1, 9), st.sampled_from([2, 4]), st.integers(0, 4)),
)
def test_equals_the_layers(
    dtype, batch, more, image_channels, channels, activation, bias, window
) -> None:
    """Images that a window just fits in, and larger ones."""
    if dtype == torch.bfloat16:
        channels = [2 * n for n in channels]  # pairs
    convs = conv_row(image_channels, *channels, bias=bias)
    convs[0] = nn.Conv2d(image_channels, channels[0], *window, bias=bias)
    fitting = max(1, window[0] - 2 * window[2])
    x = random(batch, image_channels, *(fitting + n for n in more)).to(dtype)
    _agrees(x, convs, activation, window)


@pytest.mark.parametrize("height", [1, 67, 70])
@pytest.mark.parametrize("threads", [1, 3])
def test_large_images_are_processed_in_strips(height: int, threads: int) -> None:
    """So wide that a row of the last map is as much as is kept of the first one at a time."""
    convs = conv_row(3, 128, 16, 8)
    with using_threads(threads):
        _agrees(random(2, 3, height, 2051).float(), convs, "relu")
