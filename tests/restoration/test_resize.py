"""MATLAB's bicubic: values worked out by hand, and what any such resizing must do."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from backbones.restoration.resize import resize_bicubic


def images(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_half_at_the_edge():
    """Pixel 0 lies between 0 and 1; what lies before the edge is the edge again, mirrored."""
    row = torch.zeros(1, 8, dtype=torch.float64)
    first = []
    for place in range(4):
        one = row.clone()
        one[0, place] = 1
        first.append(resize_bicubic(one, 0.5)[0, 0].item())
    side = [0.8671875 / 2, 0.2265625 / 2, -0.0703125 / 2, -0.0234375 / 2]
    # To the right: pixels 1, 2, 3, 4; to the left: 0, then -1, -2, -3, which are 0, 1, 2.
    expected = [side[0] + side[1], side[0] + side[2], side[1] + side[3], side[2]]
    assert first == pytest.approx(expected)


@pytest.mark.parametrize("scale", [2, 3, 4, 1 / 2, 1 / 3, 1 / 4])
def test_it_equals_torch_inside(scale):
    """Which has a = -1/2 only when it antialiases; at edges it differs."""
    x = images(1, 3, 48, 36)
    sides = [round(side * scale) for side in x.shape[2:]]
    theirs = F.interpolate(x, size=sides, mode="bicubic", antialias=True)
    ours, edge = resize_bicubic(x, scale), max(3, 2 * math.ceil(scale))
    inner = (..., slice(edge, -edge), slice(edge, -edge))
    torch.testing.assert_close(ours[inner], theirs[inner])


@given(
    height=st.integers(1, 30),
    width=st.integers(1, 30),
    scale=st.sampled_from((0.25, 1 / 3, 0.5, 1.0, 2.0, 3.0, 4.0)),
    value=st.floats(-2, 2),
)
@settings(max_examples=40)
def test_constants_and_sizes(height, width, scale, value):
    x = torch.full((2, height, width), value, dtype=torch.float64)
    out = resize_bicubic(x, scale)
    sides = [
        -(-side // round(1 / scale)) if scale < 1 else round(side * scale)
        for side in (height, width)
    ]
    assert list(out.shape) == [2, *sides]
    torch.testing.assert_close(out, torch.full_like(out, value))


@pytest.mark.parametrize("scale", [2.5, 0.7, -1, 0])
def test_other_scales_are_refused(scale):
    with pytest.raises(ValueError, match=f"or 1 divided by one, got {scale}"):
        resize_bicubic(images(3, 8, 8), scale)
