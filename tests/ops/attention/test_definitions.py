"""Attention against that of all tokens to all tokens, with masks for those that none sees."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from comparisons import assert_same_with_gradients
from compiled_kernels import random
from torch import Tensor, nn
from zoo import randomise

from ops.attention.bilevel import (
    BiLevelRoutingAttention,
    bilevel_routing_attention,
    route_regions,
)
from ops.attention.cascaded import (
    CascadedGroupAttention,
    cascaded_group_attention,
    distance_bias,
    resize_distance_table,
)
from ops.attention.hilo import HiLoAttention
from ops.attention.pooled import PooledAttention
from ops.attention.window import (
    OverlappingWindowAttention,
    WindowAttention,
)


def attend(
    query: Tensor, key: Tensor, value: Tensor, added: Tensor | float = 0, scale: float | None = None
) -> Tensor:
    """(B, N, heads, d), (B, M, heads, d) twice and terms (…, N, M) → (B, N, heads · d)."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = torch.einsum("bnhd,bmhd->bhnm", query, key) * scale + added
    return torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), value).flatten(2)


def places(height: int, width: int) -> Tensor:
    """Row and column of each token."""
    return torch.cartesian_prod(torch.arange(height), torch.arange(width))


def unseen(seen: Tensor) -> Tensor:
    return torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, -torch.inf)


def split(x: Tensor, *parts: int) -> Tensor:
    """(B, H, W, C) → (B, HW, *parts, C of a part)."""
    return x.flatten(1, 2).unflatten(2, (*parts, -1))


def windows(layer: WindowAttention, x: Tensor) -> Tensor:
    size, shift, (height, width) = layer.window_size, layer.shift_size, x.shape[1:3]
    place = places(height, width)
    seen = (place[:, None] // size == place // size).all(-1)
    ends = place >= torch.tensor([height, width]) - shift  # which came from the other end
    apart = (ends[:, None] != ends).any(-1)
    index = ((place[:, None] - place + size - 1) * torch.tensor([2 * size - 1, 1])).sum(-1)
    bias = layer.relative_position_bias_table[index.where(seen, 0)].permute(2, 0, 1)
    qkv = split(layer.qkv(x.roll((-shift, -shift), (1, 2))), 3, layer.num_heads)
    out = attend(*qkv.unbind(2), bias - 100.0 * apart + unseen(seen))
    return layer.proj(out.view(x.shape)).roll((shift, shift), (1, 2))


def overlapping(layer: OverlappingWindowAttention, x: Tensor) -> Tensor:
    """Keys beyond the map are zeros that are seen."""
    size, large, (height, width) = layer.window_size, layer.overlap_size, x.shape[1:3]
    margin = (large - size) // 2
    own, others = places(height, width), places(height + 2 * margin, width + 2 * margin)
    first = (own // size * size)[:, None]
    seen = ((others >= first) & (others < first + large)).all(-1)
    # Rows before the first count from the end of the table, as in the published model.
    steps = torch.tensor([size + large - 1, 1])
    index = ((others - own[:, None] + size - large + 1) * steps).sum(-1)
    bias = layer.relative_position_bias_table[index.where(seen, 0)].permute(2, 0, 1)
    query, *padded = layer.qkv(x).chunk(3, dim=-1)
    padded = [F.pad(t, (0, 0, *[margin] * 4)) for t in padded]
    heads = (split(t, layer.num_heads) for t in (query, *padded))
    return layer.proj(attend(*heads, bias + unseen(seen)).view(x.shape))


def hilo(layer: HiLoAttention, x: Tensor) -> Tensor:
    """Padding with zeros, both branches, high before low."""
    size, (height, width) = layer.window_size, x.shape[1:3]
    padded, outs = F.pad(x, (0, 0, 0, -width % size, 0, -height % size)), []
    if (high := layer.high) is not None:
        window = places(*padded.shape[1:3]) // size
        qkv = split(high.qkv(padded), 3, high.num_heads)
        seen = (window[:, None] == window).all(-1)
        outs.append(high.proj(attend(*qkv.unbind(2), unseen(seen))))
    if (low := layer.low) is not None:
        coarse = padded.unflatten(2, (-1, size)).unflatten(1, (-1, size)).mean((2, 4))
        key, value = split(low.kv(coarse), 2, low.num_heads).unbind(2)
        outs.append(low.proj(attend(split(low.q(padded), low.num_heads), key, value)))
    return torch.cat(outs, dim=2).view(padded.shape)[:, :height, :width]


def routed(
    maps: Sequence[Tensor], num_heads: int, sides: tuple[int, ...], topk: int, scale: float | None
) -> Tensor:
    """Padding is seen, but has no part in the means by which regions are chosen."""
    height, width = maps[0].shape[1:3]
    rows, columns = (-(-n // side) for n, side in zip((height, width), sides, strict=True))
    place = places(rows * sides[0], columns * sides[1])
    region = (place // torch.tensor(sides) * torch.tensor([columns, 1])).sum(1)
    exists = (place < torch.tensor([height, width])).all(1)
    more = (0, 0, 0, columns * sides[1] - width, 0, rows * sides[0] - height)
    parts = [F.pad(t, more) for t in maps]
    query_means, key_means = (
        torch.stack(
            [t.flatten(1, 2)[:, (region == r) & exists].mean(1) for r in range(rows * columns)], 1
        )
        for t in parts[:2]
    )
    near = query_means @ key_means.transpose(1, 2)
    chosen = torch.zeros_like(near).scatter(2, near.topk(min(topk, len(near[0]))).indices, 1)
    seen = chosen[:, region][:, :, region].unsqueeze(1) > 0
    scale = maps[0].shape[-1] ** -0.5 if scale is None else scale  # not that of the heads' width
    out = attend(*(split(t, num_heads) for t in parts), unseen(seen), scale)
    return out.view(parts[2].shape)[:, :height, :width]


def bilevel(layer: BiLevelRoutingAttention, x: Tensor) -> Tensor:
    height, width = x.shape[1:3]
    if layer.pad_input:
        x = F.pad(x, (0, 0, 0, -width % layer.n_win, 0, -height % layer.n_win))
    sides = tuple(max(1, n // layer.n_win) for n in x.shape[1:3])
    maps = layer.qkv(x).chunk(3, dim=-1)
    out = routed(maps, layer.num_heads, sides, layer.topk, None)
    lepe = layer.lepe(maps[2].movedim(-1, 1)).movedim(1, -1)
    return layer.proj(out + lepe)[:, :height, :width]


def pooled(layer: PooledAttention, x: Tensor) -> Tensor:
    means = x
    if layer.sr_ratio > 1:
        means = F.avg_pool1d(x.transpose(1, 2), layer.sr_ratio**2)
        means = layer.norm(means).transpose(1, 2)
    parts = layer.q(x), layer.k(means), layer.v(means)
    return layer.proj(attend(*(t.unflatten(2, (layer.num_heads, -1)) for t in parts)))


Case = tuple[Callable[..., Tensor], Callable[[], nn.Module], tuple[int, ...]]
CASES: list[Case] = [
    *(
        (windows, lambda a=arguments: WindowAttention(4, *a), (2, *size, 4))
        for arguments, size in [
            *(((1, 2), (2, 3)), ((3, 1), (3, 6)), ((2, 2, 1), (4, 6)), ((2, 1, 1), (2, 2))),
            *(((3, 2, 1), (6, 3)), ((3, 2, 2), (3, 9))),
        ]
    ),
    *(
        (overlapping, lambda a=a: OverlappingWindowAttention(4, *a), (1, 2 * a[0], a[0], 4))
        for a in [(2, 2, 1.0), (4, 2, 0.5), (3, 2, 0.0), (2, 2, 2.0)]
    ),
    *(
        (hilo, lambda a=arguments: HiLoAttention(16, 4, *a), (2, *size, 16))
        for arguments, size in [
            *(((2, 0.5), (5, 4)), ((3, 0.25), (4, 7)), ((2, 0.0), (3, 2)), ((2, 1.0), (1, 5))),
            *(((3, 0.9), (7, 2)), ((1, 0.5), (3, 4))),
        ]
    ),
    *(
        (bilevel, lambda p=pads: BiLevelRoutingAttention(8, 2, 3, 2, pad_input=p), (2, *size, 8))
        for pads in (True, False)
        for size in [(6, 9), (7, 9), (5, 4), (11, 6), (2, 1), (1, 1)]
    ),
    *(
        (pooled, lambda r=ratio, t=trains: PooledAttention(8, 2, r).train(t), (2, tokens, 8))
        for ratio, tokens in [(1, 7), (2, 15)]
        for trains in (False, True)
    ),
]


@pytest.mark.parametrize(
    ("definition", "make", "shape"), CASES, ids=[f"{d.__name__} {shape}" for d, _, shape in CASES]
)
def test_layer_is_its_definition_with_its_gradients(
    definition: Callable[..., Tensor], make: Callable[[], nn.Module], shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    layer, x = randomise(make()).double(), random(*shape).requires_grad_()
    if hasattr(layer, "relative_position_bias_table"):
        nn.init.normal_(layer.relative_position_bias_table)  # which matters beside the scores
    assert_same_with_gradients(layer(x), definition(layer, x), [x, *layer.parameters()])


# ---- bi-level routing ----------------------------------------------------------------------------
def maps(height: int, width: int) -> list[Tensor]:
    return [random(2, height, width, c, seed=seed) for seed, c in enumerate((8, 8, 12))]


@pytest.mark.parametrize(
    ("size", "num_heads", "region_size", "topk", "scale"),
    [
        ((6, 8), 2, (3, 2), 3, None),
        ((6, 8), 1, (3, 2), 1, 0.2),
        ((7, 9), 4, (3, 2), 2, None),
        ((5, 5), 2, (2, 3), 100, 0.0),
        ((3, 4), 2, (1, 1), 5, None),
        ((4, 6), 2, (7, 9), 1, None),
    ],
)
def test_routing(
    size: tuple[int, int],
    num_heads: int,
    region_size: tuple[int, int],
    topk: int,
    scale: float | None,
) -> None:
    given, options = [t.requires_grad_() for t in maps(*size)], (num_heads, region_size, topk)
    out = bilevel_routing_attention(*given, *options, scale=scale)
    assert_same_with_gradients(out, routed(given, *options, scale), given)


def test_half_precision_and_meta() -> None:
    given = [t.bfloat16() for t in maps(6, 6)]
    assert bilevel_routing_attention(*given, 2, (2, 2), 9).dtype == torch.bfloat16
    assert bilevel_routing_attention(*given, 2, (2, 2), 3).isfinite().all()
    # Affinities of bfloat16 would be ties.
    query, key = (random(1, 16, 16, 8, seed=seed).bfloat16() for seed in (1, 2))
    found, exact = (
        route_regions(query.to(t), key.to(t), (1, 1), 9) for t in (torch.bfloat16, torch.float64)
    )
    assert torch.equal(found.sort(-1).values, exact.sort(-1).values)
    empty = [torch.empty_like(t, device="meta") for t in given]
    assert bilevel_routing_attention(*empty, 2, (4, 4), 1).shape == given[2].shape


# ---- one head, and one head after the other ------------------------------------------------------
def one_head(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | float = 0) -> Tensor:
    """(B, d, H, W) twice, (B, C, H, W) and (HW, HW) → (B, C, H, W)."""
    tokens = (t.flatten(2).transpose(1, 2).unsqueeze(2) for t in (query, key, value))
    return attend(*tokens, bias).transpose(1, 2).view(value.shape)


def cascaded(x: Tensor, projections: Any, bias: Tensor) -> Tensor:
    outputs: list[Tensor] = []
    for i, (share, project) in enumerate(zip(x.chunk(len(bias), 1), projections, strict=True)):
        outputs.append(one_head(*project(share + outputs[-1] if i else share), bias[i]))
    return torch.cat(outputs, dim=1)


def test_cascaded_groups_with_their_gradients() -> None:
    torch.manual_seed(0)
    convs = nn.ModuleList(nn.Conv2d(4, 5 + 5 + 4, 1) for _ in range(3)).double()
    projections = [lambda x, conv=conv: conv(x).split([5, 5, 4], dim=1) for conv in convs]
    x, bias = random(2, 12, 3, 4).requires_grad_(), random(3, 12, 12, seed=1).requires_grad_()
    out, expected = (f(x, projections, bias) for f in (cascaded_group_attention, cascaded))
    assert_same_with_gradients(out, expected, [x, bias, *convs.parameters()])
    plain = cascaded_group_attention(x, projections)
    torch.testing.assert_close(plain, cascaded(x, projections, torch.zeros_like(bias)))


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (4, 2)])
def test_bias_belongs_to_the_distance(size: tuple[int, int]) -> None:
    table, place = random(2, *size), places(*size)
    rows, columns = (place[:, None] - place).abs().unbind(2)
    assert torch.equal(distance_bias(table), table[:, rows, columns])


def test_table_is_resized_only_if_needed() -> None:
    table = torch.arange(16.0).view(1, 4, 4)
    assert resize_distance_table(table, 4, 4) is table
    resized = resize_distance_table(table, 7, 5)
    assert resized.shape == (1, 7, 5)
    assert (resized.diff(dim=1) > 0).all() and (resized.diff(dim=2) > 0).all()
    steps = torch.tensor([0.0, 0, 1, 1]).expand(1, 4, 4)
    assert resize_distance_table(steps, 8, 8).max() > 1, "bicubically, beyond the entries"


@pytest.mark.parametrize(
    ("size", "window_size"), [((9, 5), 4), ((4, 11), 4), ((8, 8), 4), ((3, 5), 7)]
)
def test_windows_are_padded_with_zeros_and_do_not_see_each_other(
    size: tuple[int, int], window_size: int
) -> None:
    """But for a small map, which is one window on an interpolated table."""
    torch.manual_seed(0)
    layer = CascadedGroupAttention(8, 2, qk_dim=4, window_size=window_size)
    layer, x = randomise(layer).double().eval(), random(2, 8, *size)
    side = window_size if max(size) > window_size else None
    table = layer.attention_biases.view(2, window_size, window_size)
    bias = distance_bias(resize_distance_table(table, *([side] * 2 if side else size)))
    padded = F.pad(x, (0, -size[1] % side, 0, -size[0] % side)) if side else x
    rows = [
        torch.cat([cascaded(part, layer.heads, bias) for part in band.split(side or 9, 3)], 3)
        for band in padded.split(side or 9, 2)
    ]
    expected = layer.proj(torch.cat(rows, 2).relu())[:, :, : size[0], : size[1]]
    torch.testing.assert_close(layer(x), expected)
