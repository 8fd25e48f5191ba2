"""The split form of neighborhood attention in plain torch, tile by tile, on any device.

https://arxiv.org/abs/2204.07143. Tiles are those of :mod:`ops.neighborhood.tiled`: a tile's queries
meet the union of their windows in one matrix product, and each query's window is gathered from it.
A non-finite value affects all queries of the tiles that read it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ops.neighborhood._tiles import Tiles, tiles_of_map

# Kernel size, dilation, and whether they are causal, of each axis.
Window = tuple[Sequence[int], Sequence[int], Sequence[bool]]


def scores(query: Tensor, key: Tensor, rpb: Tensor | None, fill: float, window: Window) -> Tensor:
    """(B, H, *S, D) twice → (B, H, *S, K); ``fill`` where a causal window has no key."""
    precise = torch.promote_types(query.dtype, torch.float32)
    out = query.new_empty(*query.shape[:-1], math.prod(window[0]))
    out_tokens = out.flatten(2, -2)
    query, key = query.flatten(2, -2), key.flatten(2, -2)
    for tiles in _steps(out, query.shape[-1], window):
        products = _gather(query, tiles.queries, precise) @ _gather(key, tiles.keys, precise).mT
        if rpb is not None:
            products += rpb.flatten(1)[:, tiles.offsets].to(precise).unsqueeze(1)
        columns = tiles.columns.expand(*products.shape[:-1], -1)
        of_window = products.gather(-1, columns).masked_fill_(~tiles.seen, fill)
        _scatter(out_tokens, tiles.queries, of_window)
    return out


def mix(weights: Tensor, value: Tensor, window: Window) -> Tensor:
    """(B, H, *S, K) and (B, H, *S, D) → (B, H, *S, D), Σ weight · value over the window."""
    precise = torch.promote_types(value.dtype, torch.float32)
    out = torch.empty(value.shape, dtype=value.dtype, device=value.device)
    out_tokens = out.flatten(2, -2)
    tokens, value = weights.flatten(2, -2), value.flatten(2, -2)
    for tiles in _steps(weights, value.shape[-1], window):
        of_tile = _of_keys(_gather(tokens, tiles.queries, precise), tiles)
        _scatter(out_tokens, tiles.queries, of_tile @ _gather(value, tiles.keys, precise))
    return out


def scatter(weights: Tensor, query: Tensor, window: Window) -> Tensor:
    """(B, H, *S, K) and (B, H, *S, D) → (B, H, *S, D), Σ weight · query over a key's queries.

    The adjoint of :func:`mix`.
    """
    precise = torch.promote_types(query.dtype, torch.float32)
    out = torch.zeros(query.shape, dtype=precise, device=query.device)
    out_tokens = out.flatten(2, -2)
    tokens, flat = weights.flatten(2, -2), query.flatten(2, -2)
    for tiles in _steps(weights, query.shape[-1], window):
        of_tile = _of_keys(_gather(tokens, tiles.queries, precise), tiles)
        rows = of_tile.mT @ _gather(flat, tiles.queries, precise)
        out_tokens.index_add_(2, tiles.keys.flatten(), rows.flatten(2, 3))
    return out.to(query.dtype)


def _steps(weights: Tensor, dim: int, window: Window) -> Iterator[Tiles]:
    """The tiles of the map, in portions with small temporary tensors."""
    batch, heads, *size, _ = weights.shape
    kernel_size, dilation, is_causal = map(tuple, window)
    stride = (1,) * len(size)
    for tiles in tiles_of_map(
        tuple(size), kernel_size, stride, dilation, is_causal, weights.device
    ):
        queries, keys = tiles.visible.shape
        yield from tiles.steps(batch * heads * keys * (dim + 2 * queries))


def _of_keys(weights: Tensor, tiles: Tiles) -> Tensor:
    """Weights of windows (…, T, K) as weights of all the tile's keys (…, T, U)."""
    keys = tiles.keys.shape[1]
    # Weights of keys that do not exist go to one more column.
    columns = torch.where(tiles.seen, tiles.columns, keys).expand_as(weights)
    spread = weights.new_zeros(*weights.shape[:-1], keys + 1)
    return spread.scatter_(-1, columns, weights)[..., :keys]


def _gather(tokens: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, H, N, C) by (tiles, T) → (B, H, tiles, T, C)."""
    return tokens.index_select(2, index.flatten()).unflatten(2, index.shape).to(dtype)


def _scatter(tokens: Tensor, index: Tensor, tiles: Tensor) -> None:
    """Write (B, H, tiles, T, C) to the tokens (tiles, T) of (B, H, N, C)."""
    tokens.index_copy_(2, index.flatten(), tiles.flatten(2, 3).to(tokens.dtype))
