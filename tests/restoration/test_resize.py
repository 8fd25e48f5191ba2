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
        first.append(resize_bicubic(one, size=(1, 4))[0, 0].item())
    side = [0.8671875 / 2, 0.2265625 / 2, -0.0703125 / 2, -0.0234375 / 2]
    # To the right: pixels 1, 2, 3, 4; to the left: 0, then -1, -2, -3, which are 0, 1, 2.
    expected = [side[0] + side[1], side[0] + side[2], side[1] + side[3], side[2]]
    assert first == pytest.approx(expected)


@pytest.mark.parametrize("scale", [2, 3, 4, 1 / 2, 1 / 3, 1 / 4])
def test_it_equals_torch_inside(scale):
    """torch's bicubic has a = -1/2 only when it antialiases; at edges it differs."""
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
@settings(max_examples=40, deadline=None)
def test_constants_and_sizes(height, width, scale, value):
    x = torch.full((2, height, width), value, dtype=torch.float64)
    out = resize_bicubic(x, scale)
    sides = [
        -(-side // round(1 / scale)) if scale < 1 else round(side * scale)
        for side in (height, width)
    ]
    assert list(out.shape) == [2, *sides]
    torch.testing.assert_close(out, torch.full_like(out, value))


@given(scale=st.sampled_from((2, 3, 4)), data=st.data())
@settings(max_examples=30, deadline=None)
def test_windows_are_parts_of_the_whole(scale, data):
    x = images(3, 24, 36)
    whole = resize_bicubic(x, 1 / scale)
    rows, columns = whole.shape[1:]
    top, left = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, columns - 1))
    bottom, right = data.draw(st.integers(top + 1, rows)), data.draw(st.integers(left + 1, columns))
    part = resize_bicubic(x, 1 / scale, window=(top, left, bottom, right))
    assert torch.equal(part, whole[:, top:bottom, left:right])


def test_bad_arguments_are_named():
    x = images(3, 8, 8)
    with pytest.raises(ValueError, match="either scale or size, got None and None"):
        resize_bicubic(x)
    with pytest.raises(ValueError, match="scale must be positive, got -1"):
        resize_bicubic(x, -1)
    with pytest.raises(ValueError, match="cannot resize 8×8 to 0×4"):
        resize_bicubic(x, size=(0, 4))
    with pytest.raises(ValueError, match=r"window \(0, 0, 5, 4\) exceeds the result of 4×4"):
        resize_bicubic(x, 0.5, window=(0, 0, 5, 4))
