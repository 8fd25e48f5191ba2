"""MATLAB's bicubic: values worked out by hand, and what any such resizing must do."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from backbones.restoration.resize import axis_weights, cubic, resize_bicubic


def images(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_kernel():
    """Keys' polynomials at quarters, with a = -1/2."""
    x = torch.tensor([0, 0.25, 0.75, 1, 1.25, 1.75, 2, 3], dtype=torch.float64)
    expected = [1, 0.8671875, 0.2265625, 0, -0.0703125, -0.0234375, 0, 0]
    assert cubic(x).tolist() == expected
    assert torch.equal(cubic(-x), cubic(x))


def test_half_in_the_middle():
    """Pixel 4 of 10 lies between pixels 8 and 9 of 20: the kernel at ±¼, ±¾, …, stretched by 2."""
    places, weights = axis_weights(20, 0.5, 4, 5)
    taps = dict(zip(places[0].tolist(), weights[0].tolist(), strict=True))
    side = [0.8671875, 0.2265625, -0.0703125, -0.0234375]
    for step, value in enumerate(side):
        assert taps[9 + step] == taps[8 - step] == pytest.approx(value / 2)
    assert sum(taps.values()) == pytest.approx(1)
    assert sum(value != 0 for value in taps.values()) == 8


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


def test_twice_by_hand():
    """Enlarging does not widen the kernel: pixel 5 of 12 lies a quarter behind pixel 2 of 6."""
    places, weights = axis_weights(6, 2.0, 5, 6)
    taps = {p: w for p, w in zip(places[0].tolist(), weights[0].tolist(), strict=True) if w}
    assert taps == pytest.approx({1: -0.0703125, 2: 0.8671875, 3: 0.2265625, 4: -0.0234375})


def test_enlarging_equals_torch_inside():
    """torch's bicubic has a = -1/2 only when it antialiases; at edges it differs."""
    x = images(1, 3, 12, 14)
    ours = resize_bicubic(x, 2.0)
    theirs = F.interpolate(x, scale_factor=2, mode="bicubic", antialias=True)
    torch.testing.assert_close(ours[..., 4:-4, 4:-4], theirs[..., 4:-4, 4:-4])


def test_shrinking_equals_torch_inside():
    x = images(1, 3, 40, 32)
    for scale in (2, 4):
        theirs = F.interpolate(x, scale_factor=1 / scale, mode="bicubic", antialias=True)
        ours = resize_bicubic(x, 1 / scale)
        torch.testing.assert_close(ours[..., 3:-3, 3:-3], theirs[..., 3:-3, 3:-3])


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
