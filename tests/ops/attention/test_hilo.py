"""HiLo attention against its definition, token by token."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ops.attention.hilo import (
    HiLoAttention,
)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def attend(query: Tensor, key: Tensor, value: Tensor, num_heads: int) -> Tensor:
    """One query (dim,) over keys and values (M, dim), head by head."""
    outs = []
    for q, k, v in zip(
        query.chunk(num_heads), key.chunk(num_heads, 1), value.chunk(num_heads, 1), strict=True
    ):
        outs.append(((k @ q) / len(q) ** 0.5).softmax(0) @ v)
    return torch.cat(outs)


def naive_high(qkv: Tensor, num_heads: int, size: int) -> Tensor:
    query, key, value = qkv.chunk(3, dim=3)
    out = torch.empty_like(query)
    for b in range(qkv.shape[0]):
        for y in range(qkv.shape[1]):
            for x in range(qkv.shape[2]):
                top, left = y // size * size, x // size * size
                k, v = (
                    t[b, top : top + size, left : left + size].flatten(0, 1) for t in (key, value)
                )
                out[b, y, x] = attend(query[b, y, x], k, v, num_heads)
    return out


def naive_low(query: Tensor, key_value: Tensor, num_heads: int) -> Tensor:
    out = torch.empty_like(query)
    for b in range(query.shape[0]):
        key, value = key_value[b].flatten(0, 1).chunk(2, dim=1)
        for y in range(query.shape[1]):
            for x in range(query.shape[2]):
                out[b, y, x] = attend(query[b, y, x], key, value, num_heads)
    return out


@given(
    alpha=st.sampled_from([0.0, 0.25, 0.5, 0.9, 1.0]),
    size=st.integers(1, 3),
    height=st.integers(1, 7),
    width=st.integers(1, 7),
)
@settings(max_examples=25, deadline=None)
def test_module(alpha: float, size: int, height: int, width: int) -> None:
    """Padding with zeros, both branches, high before low."""
    torch.manual_seed(0)
    module = HiLoAttention(16, 4, size, alpha).double()
    x = random(2, height, width, 16)
    padded = F.pad(x, (0, 0, 0, -width % size, 0, -height % size))
    outs = []
    if module.high is not None:
        high = module.high
        outs.append(high.proj(naive_high(high.qkv(padded), high.num_heads, size)))
    if module.low is not None:
        low = module.low
        coarse = torch.stack(
            [
                torch.stack(
                    [
                        padded[:, y : y + size, x : x + size].mean((1, 2))
                        for x in range(0, padded.shape[2], size)
                    ],
                    dim=1,
                )
                for y in range(0, padded.shape[1], size)
            ],
            dim=1,
        )
        outs.append(low.proj(naive_low(low.q(padded), low.kv(coarse), low.num_heads)))
    expected = torch.cat(outs, dim=3)[:, :height, :width]
    assert expected.shape == x.shape
    torch.testing.assert_close(module(x), expected)


@pytest.mark.parametrize(
    ("alpha", "size", "low", "high"),
    [(0.0, 2, 0, 12), (0.2, 2, 2, 10), (0.9, 2, 10, 2), (1.0, 2, 12, 0), (0.0, 1, 12, 0)],
)
def test_heads_are_divided(alpha: float, size: int, low: int, high: int) -> None:
    module = HiLoAttention(48, 12, size, alpha)
    assert (module.low.num_heads if module.low else 0) == low
    assert (module.high.num_heads if module.high else 0) == high
