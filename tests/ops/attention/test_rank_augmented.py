"""Rank-augmented linear attention against the paper's formula, one token at a time."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from comparisons import assert_same_with_gradients
from torch import Tensor

from ops.attention.rank_augmented import (
    RankAugmentedAttention,
    rank_augmented_linear_attention,
    rotary_table,
)


def heads(*shape: int, count: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(sum(shape))
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(count)]


def rotated(x: Tensor, row: int, column: int) -> Tensor:
    """One head's channels, turned pair by pair."""
    quarter = x.shape[-1] // 4
    turned = []
    for pair, (a, b) in enumerate(zip(x[::2], x[1::2], strict=True)):
        frequency = 10000 ** -(pair % quarter / max(1, quarter - 1))
        angle = (row if pair < quarter else column) * frequency
        turned += [
            a * math.cos(angle) - b * math.sin(angle),
            b * math.cos(angle) + a * math.sin(angle),
        ]
    return torch.stack(turned)


def published(query: Tensor, key: Tensor, value: Tensor, width: int) -> Tensor:
    """The formula with its factors of N, for tokens (N, d) of one head on a map of ``width``."""
    count, dim = query.shape
    q = torch.where(query > 0, query + 1, query.exp())
    k = torch.where(key > 0, key + 1, key.exp())
    weights = ((q.mean(0) * dim**-0.5) @ k.T).softmax(0)
    k = count * weights[:, None] * k
    places = [divmod(t, width) for t in range(count)]
    state = sum(
        torch.outer(rotated(k[t], *places[t]) * count**-0.5, value[t] * count**-0.5)
        for t in range(count)
    )
    return torch.stack(
        [rotated(q[t], *places[t]) @ state / (q[t] @ k.mean(0) + 1e-6) for t in range(count)]
    )


@pytest.mark.parametrize(("height", "width", "dim"), [(3, 4, 8), (5, 2, 12), (1, 1, 4)])
def test_is_the_published_formula_with_its_gradients(height: int, width: int, dim: int) -> None:
    maps = [t.requires_grad_() for t in heads(2, 3, height * width, dim)]
    table = rotary_table(height, width, dim, dtype=torch.float64)
    out = rank_augmented_linear_attention(*maps, table)
    expected = torch.stack(
        [
            torch.stack([published(q[h], k[h], v[h], width) for h in range(3)])
            for q, k, v in zip(*maps, strict=True)
        ]
    )
    assert_same_with_gradients(out, expected, maps)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_single(dtype: torch.dtype) -> None:
    """No sum overflows, though there are more tokens than float16 can count."""
    query, key, value = (t.to(dtype) for t in heads(1, 1, 70000, 4))
    table = rotary_table(250, 280, 4)
    out = rank_augmented_linear_attention(query, key, value, table)
    assert out.dtype == dtype
    exact = rank_augmented_linear_attention(
        query.double(), key.double(), value.double(), [t.double() for t in table]
    )
    torch.testing.assert_close(out, exact.to(dtype), rtol=2e-2, atol=1e-3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(rank_augmented_linear_attention(query, key, value, table), out)


@pytest.mark.parametrize("linear", [True, False])
def test_layer(linear: bool) -> None:
    torch.manual_seed(0)
    layer = RankAugmentedAttention(16, 2, linear=linear).double()
    x = torch.randn(2, 3, 5, 16, dtype=torch.float64)
    q, k, v, gate = F.linear(x, layer.qkvo.weight, layer.qkvo.bias).split(16, dim=-1)
    attended = torch.zeros_like(x).flatten(1, 2)
    for b in range(2):
        for h in range(2):
            part = slice(8 * h, 8 * h + 8)
            qh, kh, vh = (t[b].flatten(0, 1)[:, part] for t in (q, k, v))
            if linear:
                attended[b, :, part] = published(qh, kh, vh, 5)
            else:
                qr, kr = (
                    torch.stack([rotated(t[i], *divmod(i, 5)) for i in range(15)]) for t in (qh, kh)
                )
                attended[b, :, part] = (qr @ kr.T * 8**-0.5).softmax(-1) @ vh
    lepe = F.conv2d(v.movedim(-1, 1), layer.lepe.weight, layer.lepe.bias, padding=2, groups=16)
    total = (attended.view(x.shape) + lepe.movedim(1, -1)) * gate
    expected = F.linear(total, layer.proj.weight, layer.proj.bias)
    torch.testing.assert_close(layer(x), expected)
    table = rotary_table(3, 5, 8, dtype=torch.float64)
    torch.testing.assert_close(layer(x, table), expected)
