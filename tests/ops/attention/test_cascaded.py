"""Cascaded group attention against the loops that its paper describes."""

from __future__ import annotations

import pytest
import torch
from comparisons import assert_same_with_gradients
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from zoo import randomise

from ops.attention.cascaded import (
    CascadedGroupAttention,
    cascaded_group_attention,
    distance_bias,
    resize_distance_table,
)


class Share(nn.Module):
    """Query, key and value by one pointwise convolution."""

    def __init__(self, dim: int, qk_dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, 2 * qk_dim + dim, 1)
        self.splits = (qk_dim, qk_dim, dim)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.conv(x).split(self.splits, dim=1)


def naive(x: Tensor, projections: nn.ModuleList, bias: Tensor) -> Tensor:
    """One query, one head, one image at a time."""
    width = x.shape[1] // len(projections)
    outputs, previous = [], torch.zeros(())
    for head, project in enumerate(projections):
        share = x[:, head * width : (head + 1) * width] + previous
        query, key, value = (t.flatten(2) for t in project(share))
        images = []
        for b in range(len(x)):
            columns = []
            for i in range(query.shape[2]):
                logits = query[b, :, i] @ key[b] * query.shape[1] ** -0.5 + bias[head, i]
                columns.append(value[b] @ logits.softmax(0))
            images.append(torch.stack(columns, dim=1))
        previous = torch.stack(images).unflatten(2, x.shape[2:])
        outputs.append(previous)
    return torch.cat(outputs, dim=1)


def test_function_is_the_definition_with_its_gradients() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 12, 3, 4, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(3, 12, 12, dtype=torch.float64, requires_grad=True)
    projections = nn.ModuleList(Share(4, 5) for _ in range(3)).double()
    leaves = [x, bias, *projections.parameters()]
    out = cascaded_group_attention(x, list(projections), bias)
    expected = naive(x, projections, bias)
    assert_same_with_gradients(out, expected, leaves)
    plain = cascaded_group_attention(x, list(projections))
    torch.testing.assert_close(plain, naive(x, projections, torch.zeros_like(bias)))


@given(height=st.integers(1, 5), width=st.integers(1, 5))
@settings(max_examples=25, deadline=None)
def test_bias_belongs_to_the_distance(height: int, width: int) -> None:
    table = torch.randn(2, height, width)
    bias = distance_bias(table).unflatten(2, (height, width)).unflatten(1, (height, width))
    for i in range(height):
        for j in range(width):
            for k in range(height):
                for m in range(width):
                    assert torch.equal(bias[:, i, j, k, m], table[:, abs(i - k), abs(j - m)])


def test_table_is_resized_only_if_needed() -> None:
    table = torch.arange(16.0).view(1, 4, 4)
    assert resize_distance_table(table, 4, 4) is table
    resized = resize_distance_table(table, 7, 5)
    assert resized.shape == (1, 7, 5)
    assert (resized.diff(dim=1) > 0).all() and (resized.diff(dim=2) > 0).all()
    steps = torch.tensor([0.0, 0, 1, 1]).expand(1, 4, 4)
    assert resize_distance_table(steps, 8, 8).max() > 1, "bicubically, beyond the entries"
    constant = resize_distance_table(torch.full((2, 4, 4), 3.0), 7, 7)
    torch.testing.assert_close(constant, torch.full((2, 7, 7), 3.0))


@pytest.mark.parametrize("size", [(9, 5), (4, 11), (8, 8)])
def test_windows_are_padded_with_zeros_and_do_not_see_each_other(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    layer = randomise(CascadedGroupAttention(8, 2, qk_dim=4, window_size=4)).double().eval()
    x = torch.randn(2, 8, *size, dtype=torch.float64)
    out = layer(x)
    padded = torch.zeros(2, 8, *(-(-n // 4) * 4 for n in size), dtype=torch.float64)
    padded[:, :, : size[0], : size[1]] = x
    for top in range(0, padded.shape[2], 4):
        for left in range(0, padded.shape[3], 4):
            alone = layer(padded[:, :, top : top + 4, left : left + 4])
            seen = out[:, :, top : top + 4, left : left + 4]
            torch.testing.assert_close(seen, alone[:, :, : seen.shape[2], : seen.shape[3]])


def test_a_small_map_is_one_window_on_an_interpolated_table() -> None:
    torch.manual_seed(0)
    layer = randomise(CascadedGroupAttention(8, 2, qk_dim=4, window_size=7)).double().eval()
    x = torch.randn(1, 8, 3, 5, dtype=torch.float64)
    bias = distance_bias(resize_distance_table(layer.attention_biases.view(2, 7, 7), 3, 5))
    mixed = cascaded_group_attention(x, list(layer.heads), bias)
    torch.testing.assert_close(layer(x), layer.proj(mixed.relu()))
