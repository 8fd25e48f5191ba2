"""Factorized attention against the loops that describe it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from zoo import randomise

from ops.attention.factorized import FactorizedAttention, cross_window_fusion


def reflect(position: int, size: int) -> int:
    """Walk back and forth between the edges."""
    place, step = 0, 1
    for _ in range(position if size > 1 else 0):
        if not 0 <= place + step < size:
            step = -step
        place += step
    return place


def naive_fusion(x: Tensor, num_heads: int, window_size: int, dilation: int) -> Tensor:
    """One tap at a time."""
    span, tokens = dilation * (window_size - 1) + 1, []
    for tap in range(window_size**2):
        near = x
        for axis, offset in enumerate(divmod(tap, window_size), 1):
            size = x.shape[axis]
            places = [reflect(i + dilation * offset, size) for i in range(0, size, span)]
            near = near.index_select(axis, torch.tensor(places))
        flat = near.unflatten(3, (num_heads, -1)).movedim(3, 1).flatten(2)  # channels fastest
        tokens.append(flat.unflatten(2, (x.shape[3] // num_heads, -1)).mean(3))
    return torch.stack(tokens, dim=2)


@given(
    height=st.integers(1, 15),
    width=st.integers(1, 15),
    num_heads=st.integers(1, 3),
    window_size=st.integers(1, 3),
    dilation=st.integers(1, 4),
)
@settings(max_examples=40)
def test_fusion_is_its_definition(
    height: int, width: int, num_heads: int, window_size: int, dilation: int
) -> None:
    x = torch.randn(1, height, width, 4 * num_heads, dtype=torch.float64)
    tokens = cross_window_fusion(x, num_heads, window_size, dilation)
    torch.testing.assert_close(tokens, naive_fusion(x, num_heads, window_size, dilation))


@pytest.mark.parametrize("size", [(1, 1), (2, 9), (3, 1)])
def test_maps_smaller_than_the_reduction(size: tuple[int, int]) -> None:
    layer = randomise(FactorizedAttention(32, 2, 4, (1, 4))).double().eval()
    x = torch.randn(2, *size, 32, dtype=torch.float64)
    assert layer(x).isfinite().all()
    # The global branch sees the map reflected up to the reduction.
    columns = [reflect(i, size[1]) for i in range(max(size[1], 4))]
    rows = [reflect(i, size[0]) for i in range(max(size[0], 4))]
    query = torch.randn(2, 5, 4, dtype=torch.float64)
    small, grown = x[..., :4], x[:, rows][:, :, columns][..., :4]
    torch.testing.assert_close(layer.global_branch(query, small), layer.global_branch(query, grown))
