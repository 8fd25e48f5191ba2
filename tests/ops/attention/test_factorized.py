"""Factorized attention against the loops that describe it."""

from __future__ import annotations

import pytest
import torch
from comparisons import assert_same_with_gradients
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
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
@settings(max_examples=40, deadline=None)
def test_fusion_is_its_definition(
    height: int, width: int, num_heads: int, window_size: int, dilation: int
) -> None:
    x = torch.randn(1, height, width, 4 * num_heads, dtype=torch.float64)
    tokens = cross_window_fusion(x, num_heads, window_size, dilation)
    torch.testing.assert_close(tokens, naive_fusion(x, num_heads, window_size, dilation))


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Of one head: (N, d), (M, d) and (M, d) → (N, d)."""
    return (query @ key.T * query.shape[1] ** -0.5).softmax(1) @ value


def naive_attention(layer: FactorizedAttention, x: Tensor) -> Tensor:
    """One head and one branch at a time; x (1, H, W, dim)."""
    dim = x.shape[3]
    queries = layer.q(x).flatten(0, 2)
    wide, heads = layer.global_dim, layer.num_heads

    branch = layer.global_branch
    reduced = branch.sr(x[..., :wide].permute(0, 3, 1, 2))
    key, value = branch.kv(branch.norm(reduced.permute(0, 2, 3, 1))).split(wide, dim=3)
    value = value + branch.local_conv.conv(value.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    outs = [attend(queries[:, :wide], key.flatten(0, 2), value.flatten(0, 2))]

    source = layer.kv_pw(layer.kv_dw(x[..., wide:].permute(0, 3, 1, 2))).permute(0, 2, 3, 1)
    count = len(layer.local_branches)
    head_dim = (dim - wide) // count // heads
    for g, branch in enumerate(layer.local_branches):
        share = source[..., g * heads * head_dim : (g + 1) * heads * head_dim]
        taps = naive_fusion(share, heads, branch.window_size, branch.dilation)
        key, value = branch.kv(branch.fc(taps)).split(head_dim, dim=3)
        grid = value[0].transpose(1, 2).reshape(1, -1, branch.window_size, branch.window_size)
        grid = grid + branch.local_conv.conv(grid)
        for m in range(heads):
            start = wide + m * count * head_dim + g * head_dim
            value_of_head = grid[0, m * head_dim : (m + 1) * head_dim].flatten(1).T
            outs.append(attend(queries[:, start : start + head_dim], key[0, m], value_of_head))
    return layer.proj(torch.cat(outs, dim=1)).view(x.shape)


@pytest.mark.parametrize(("sr_ratio", "dilations"), [(2, (1, 2)), (1, (1,))])
def test_layer_is_its_definition_with_its_gradients(
    sr_ratio: int, dilations: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    layer = randomise(FactorizedAttention(32, 2, sr_ratio, dilations, window_size=3)).double()
    x = torch.randn(1, 7, 5, 32, dtype=torch.float64, requires_grad=True)
    assert_same_with_gradients(layer(x), naive_attention(layer, x), [x, *layer.parameters()])


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


def test_fuse_keeps_the_output_and_what_it_came_from() -> None:
    layer = randomise(FactorizedAttention(32, 2, 2, (1, 2))).double().eval()
    x = torch.randn(1, 6, 6, 32, dtype=torch.float64)
    expected = layer(x)
    before = layer.local_branches[0].local_conv
    weight = before.conv.weight.clone()
    for branch in layer.local_branches:
        branch.local_conv = branch.local_conv.fuse()
        assert branch.fuse().fuse() is branch
        assert isinstance(branch.fc, nn.Identity)
    layer.global_branch.local_conv = layer.global_branch.local_conv.fuse()
    torch.testing.assert_close(layer(x), expected)
    assert torch.equal(before.conv.weight, weight)
