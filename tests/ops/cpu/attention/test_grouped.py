"""Attention on tokens in place against torch's in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from compiled_kernels import using_threads
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ops.cpu.attention.grouped import attend, grouped_attention

_BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 2**-8}


def _random(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _assert_near(out: Tensor, expected: Tensor) -> None:
    assert (out - expected).abs().max() <= _BOUNDS[out.dtype] * (1 + expected.abs().max())


def _exact(query: Tensor, key: Tensor, value: Tensor, scale: float | None = None) -> Tensor:
    heads = (t.double().transpose(1, 2) for t in (query, key, value))
    return F.scaled_dot_product_attention(*heads, scale=scale).transpose(1, 2)


@settings(max_examples=60)
@given(
    batch=st.integers(1, 3),
    queries=st.integers(1, 70),
    keys=st.integers(1, 300),
    heads=st.integers(1, 3),
    dims=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    dtype=st.sampled_from(list(_BOUNDS)),
    scale=st.sampled_from([None, 0.3, 0.0, -0.3]),
)
def test_is_attention(batch, queries, keys, heads, dims, dtype, scale) -> None:
    query = _random(batch, queries, heads, dims[0] + 3, seed=1, dtype=dtype)[..., 2:-1]
    key = _random(batch, heads, keys, dims[0], seed=2, dtype=dtype).transpose(1, 2)
    value = _random(batch, keys, heads, dims[1], seed=3, dtype=dtype)
    wide = torch.full((batch, queries, heads, dims[1] + 2), 7.0, dtype=dtype)
    attend(query, key, value, wide[..., 1:-1], scale)
    _assert_near(wide[..., 1:-1], _exact(query, key, value, scale))
    assert wide[..., 0].eq(7).all() and wide[..., -1].eq(7).all()


@pytest.mark.parametrize("dtype", list(_BOUNDS))
@pytest.mark.parametrize("scale", [None, 0.0, -0.3])
@pytest.mark.parametrize("dims", [(1, 1), (16, 32), (31, 31), (32, 64), (33, 40)])
@pytest.mark.parametrize("keys", [16, 37, 64, 1500])
def test_few_queries(keys: int, dims: tuple[int, int], scale: float | None, dtype) -> None:
    """Of which lanes of vectors are keys: read as they lie or copied, and too many for it."""
    for queries in (1, 4, 9, 12, 13):
        query = _random(2, queries, 2, dims[0], seed=1, dtype=dtype)
        key, value = (torch.full((2, keys, 2, d + 1), torch.nan, dtype=dtype) for d in dims)
        key, value = key[..., :-1], value[..., :-1]  # what lies behind a row is not seen
        key.copy_(_random(*key.shape, seed=2, dtype=dtype))
        value.copy_(_random(*value.shape, seed=3, dtype=dtype))
        out = torch.empty(2, queries, 2, dims[1], dtype=dtype)
        attend(query, key, value, out, scale)
        _assert_near(out, _exact(query, key, value, scale))


def test_nan_of_a_key_is_seen() -> None:
    query, key, value = (_random(1, 4, 1, 32, seed=s).repeat(1, 8, 1, 1) for s in (1, 2, 3))
    key[0, 5, 0, 3] = float("nan")
    out = torch.zeros(1, 4, 1, 32)
    attend(query[:, :4], key, value, out)
    assert out.isnan().all()


@pytest.mark.parametrize("dtype", list(_BOUNDS))
@pytest.mark.parametrize(
    ("regions", "tokens", "topk"), [(9, 4, 3), (9, 4, 6), (6, 37, 2), (5, 1, 5), (25, 1, 20)]
)
def test_routed_regions(regions: int, tokens: int, topk: int, dtype: torch.dtype) -> None:
    batch, heads, count = 2, 3, regions * tokens
    query, key = (_random(batch, count, heads, 16, seed=s, dtype=dtype) for s in (1, 2))
    value = _random(batch, count, heads, 24, seed=3, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randperm(count, generator=generator).view(regions, tokens).int()
    routes = torch.rand(batch, regions, regions, generator=generator).argsort(-1)[..., :topk]
    out, alone, routed = (torch.empty_like(value) for _ in range(3))
    grouped_attention(query, key, value, out, rows, routes=routes, scale=0.2)
    for image in range(batch):
        for region in range(regions):
            own, seen = rows[region], rows[routes[image, region]].flatten()
            parts = ((query, own), (key, seen), (value, seen))
            expected = _exact(*(t[image : image + 1, rows] for t, rows in parts), scale=0.2)
            _assert_near(out[image, own], expected[0])
    every = torch.arange(regions).view(1, regions, 1).expand(batch, -1, -1)
    grouped_attention(query, key, value, alone, rows)
    grouped_attention(query, key, value, routed, rows, routes=every)
    assert torch.equal(alone, routed)


# Of the fewer queries, threads share those of an image out.
@pytest.mark.parametrize(("batch", "queries"), [(2, 1000), (1, 196), (2, 45), (1, 10)])
def test_threads_change_nothing(batch: int, queries: int) -> None:
    query, key, value = (_random(batch, n, 4, 32, seed=n) for n in (queries, 120, 120))
    outs = []
    for threads in (1, 2, 3):
        outs.append(torch.empty(batch, queries, 4, 32))
        with using_threads(threads):
            attend(query, key, value, outs[-1])
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])


def test_large_logits() -> None:
    query, key, value = (100 * _random(1, n, 1, 8, seed=n) for n in (20, 300, 300))
    out = torch.empty_like(query)
    attend(query, key, value, out)
    torch.testing.assert_close(out, _exact(query, key, value).float(), rtol=1e-4, atol=1e-2)
