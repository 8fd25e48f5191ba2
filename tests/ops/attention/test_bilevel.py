"""Bi-level routing attention against its definition, written out region by region."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from comparisons import assert_same_with_gradients
from torch import Tensor

from ops.attention.bilevel import (
    BiLevelRoutingAttention,
    bilevel_routing_attention,
    route_regions,
)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(height: int, width: int, qk_dim: int = 8, dim: int = 12, batch: int = 2) -> list[Tensor]:
    shapes = (qk_dim, qk_dim, dim)
    return [random(batch, height, width, c, seed=seed) for seed, c in enumerate(shapes)]


def defined(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    num_heads: int,
    region_size: tuple[int, int],
    topk: int,
) -> Tensor:
    """The definition: a softmax for each region and head, over the regions chosen by hand."""
    height, width, dim = value.shape[1:]
    rows, columns = region_size
    starts = [(y, x) for y in range(0, height, rows) for x in range(0, width, columns)]

    def tokens(t: Tensor, start: tuple[int, int]) -> Tensor:
        region = t[start[0] : start[0] + rows, start[1] : start[1] + columns]
        missing = (0, 0, 0, columns - region.shape[1], 0, rows - region.shape[0])
        return F.pad(region, missing).flatten(0, 1)

    def mean(t: Tensor, start: tuple[int, int]) -> Tensor:
        region = t[start[0] : start[0] + rows, start[1] : start[1] + columns]
        return region.detach().flatten(0, 1).mean(0)

    outputs = []
    for q, k, v in zip(query, key, value, strict=True):
        out = torch.zeros(height + rows, width + columns, dim, dtype=value.dtype)
        for start in starts:
            near = [(mean(q, start) @ mean(k, other)).item() for other in starts]
            chosen = sorted(range(len(starts)), key=lambda r, n=near: -n[r])[:topk]
            seen_k = torch.cat([tokens(k, starts[r]) for r in chosen])
            seen_v = torch.cat([tokens(v, starts[r]) for r in chosen])
            parts = []
            for qh, kh, vh in zip(
                tokens(q, start).chunk(num_heads, -1),
                seen_k.chunk(num_heads, -1),
                seen_v.chunk(num_heads, -1),
                strict=True,
            ):
                parts.append((qh @ kh.T * q.shape[-1] ** -0.5).softmax(-1) @ vh)
            region = torch.cat(parts, -1).view(rows, columns, dim)
            out[start[0] : start[0] + rows, start[1] : start[1] + columns] = region
        outputs.append(out[:height, :width])
    return torch.stack(outputs)


CASES = [
    # height, width, region_size, topk, num_heads
    (6, 8, (3, 2), 3, 2),
    (6, 8, (3, 2), 1, 1),
    (7, 9, (3, 2), 2, 4),
    (5, 5, (2, 3), 100, 2),
    (3, 4, (1, 1), 5, 2),
    (4, 6, (7, 9), 1, 2),
]


@pytest.mark.parametrize(("height", "width", "region_size", "topk", "num_heads"), CASES)
def test_equals_the_definition(
    height: int, width: int, region_size: tuple[int, int], topk: int, num_heads: int
) -> None:
    maps = [t.requires_grad_() for t in inputs(height, width)]
    out = bilevel_routing_attention(*maps, num_heads, region_size, topk)
    expected = defined(*maps, num_heads, region_size, topk)
    assert_same_with_gradients(out, expected, maps)


def test_scale() -> None:
    maps = inputs(4, 4)
    uniform = bilevel_routing_attention(*maps, 2, (2, 2), 2, scale=0.0)
    routes = route_regions(maps[0], maps[1], (2, 2), 2)
    regions = maps[2].unflatten(1, (2, 2)).unflatten(3, (2, 2)).transpose(2, 3).reshape(2, 4, 4, 12)
    expected = torch.stack([v[r].mean((1, 2)) for v, r in zip(regions, routes, strict=True)])
    torch.testing.assert_close(uniform[:, ::2, ::2].flatten(1, 2), expected)


def test_half_precision_and_meta() -> None:
    maps = [t.bfloat16() for t in inputs(6, 6)]
    assert bilevel_routing_attention(*maps, 2, (2, 2), 9).dtype == torch.bfloat16
    assert bilevel_routing_attention(*maps, 2, (2, 2), 3).isfinite().all()
    # Affinities of bfloat16 would be ties.
    query, key = (random(1, 16, 16, 8, seed=seed).bfloat16() for seed in (1, 2))
    found, exact = (
        route_regions(query.to(t), key.to(t), (1, 1), 9) for t in (torch.bfloat16, torch.float64)
    )
    assert torch.equal(found.sort(-1).values, exact.sort(-1).values)
    empty = [torch.empty_like(t, device="meta") for t in maps]
    assert bilevel_routing_attention(*empty, 2, (4, 4), 1).shape == maps[2].shape


# -- the layer ---------------------------------------------------------------------------------
def layer(**kwargs: Any) -> BiLevelRoutingAttention:
    torch.manual_seed(0)
    return BiLevelRoutingAttention(8, 2, 3, 2, **kwargs).double()


def by_hand(attn: BiLevelRoutingAttention, x: Tensor, region_size: tuple[int, int]) -> Tensor:
    query, key, value = F.linear(x, attn.qkv.weight, attn.qkv.bias).chunk(3, -1)
    out = defined(query, key, value, attn.num_heads, region_size, attn.topk)
    lepe = F.conv2d(value.movedim(-1, 1), attn.lepe.weight, attn.lepe.bias, padding=2, groups=8)
    return F.linear(out + lepe.movedim(1, -1), attn.proj.weight, attn.proj.bias)


@pytest.mark.parametrize("size", [(6, 9), (7, 9), (5, 4), (2, 1), (1, 1)])
def test_input_is_padded_to_equal_regions(size: tuple[int, int]) -> None:
    attn, x = layer(), random(2, *size, 8)
    height, width = (-(-n // 3) * 3 for n in size)
    padded = F.pad(x, (0, 0, 0, width - size[1], 0, height - size[0]))
    expected = by_hand(attn, padded, (height // 3, width // 3))[:, : size[0], : size[1]]
    torch.testing.assert_close(attn(x), expected)


@pytest.mark.parametrize("size", [(6, 9), (7, 9), (5, 4), (11, 6), (2, 1), (1, 1)])
def test_regions_of_the_second_form(size: tuple[int, int]) -> None:
    attn, x = layer(pad_input=False), random(2, *size, 8)
    region_size = (max(1, size[0] // 3), max(1, size[1] // 3))
    torch.testing.assert_close(attn(x), by_hand(attn, x, region_size))
