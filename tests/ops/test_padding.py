"""Reflection padding."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from ops.padding import reflect_pad_to_multiple, reflected_positions


@given(height=st.integers(1, 20), width=st.integers(1, 20), multiple=st.integers(1, 16))
@settings(max_examples=60, deadline=None)
def test_multiples(height: int, width: int, multiple: int) -> None:
    x = torch.arange(2.0 * height * width).view(1, 2, height, width)
    padded = reflect_pad_to_multiple(x, multiple)
    below, right = -height % multiple, -width % multiple
    assert padded.shape == (1, 2, height + below, width + right)
    assert torch.equal(padded[:, :, :height, :width], x)
    if below < height and right < width:
        assert torch.equal(padded, F.pad(x, (0, right, 0, below), mode="reflect"))


def test_repeated_reflection() -> None:
    places = reflected_positions(torch.arange(-3, 9), 4)
    assert places.tolist() == [3, 2, 1, 0, 1, 2, 3, 2, 1, 0, 1, 2]
    assert reflected_positions(torch.arange(4), 1).tolist() == [0, 0, 0, 0]
    row = torch.tensor([[[[1.0, 2.0, 3.0]]]])
    assert reflect_pad_to_multiple(row, 8)[0, 0, 0].tolist() == [1, 2, 3, 2, 1, 2, 3, 2]


def test_multiples_are_unchanged() -> None:
    x = torch.rand(1, 3, 16, 32)
    assert reflect_pad_to_multiple(x, 16) is x
