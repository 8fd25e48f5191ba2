"""Exact tiled neighborhood attention in plain torch; the fastest backend without a compiler.

Neighborhood attention: https://arxiv.org/abs/2204.07143. Queries are divided into tiles. A tile
attends to the union of its queries' windows, with a mask that is shared by congruent tiles. The
backward pass recomputes the scores tile by tile, so that memory does not grow with the window.
Masked keys have weight zero but are read: a non-finite value affects all queries of the tiles that
read it, and so does a non-finite key, in gradients and if no lse is requested.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ops.neighborhood._geometry import PARAMS, Inputs, NAParams
from ops.neighborhood._tiles import Tiles, tiles_of_map
from ops.operators import operator_with_gradients

__all__ = ["attend", "unavailable"]


def unavailable(*call: Any) -> str | None:
    """``None``: this backend supports every call."""
    return None


def attend(inputs: Inputs, params: NAParams) -> tuple[Tensor, Tensor | None]:
    """Neighborhood attention and its lse; shapes as in :mod:`ops.neighborhood`.

    Second derivatives are not supported.
    """
    query, key, value, additional_keys, additional_values, rpb = inputs
    repeats = query.shape[-2] // key.shape[-2]

    def tokens(of_map: Tensor, additional: Tensor | None) -> Tensor:
        """The map's tokens, then the additional ones: (B, N, H, D)."""
        flat = of_map.flatten(1, -3)
        flat = flat if additional is None else torch.cat([flat, additional], dim=1)
        return flat if repeats == 1 else flat.repeat_interleave(repeats, dim=-2)

    keys, values = tokens(key, additional_keys), tokens(value, additional_values)
    out, lse = _attend(query, keys, values, rpb, *params.of_operators, params.return_lse)
    return out, lse if params.return_lse else None


def _forward(*call: Any) -> tuple[Tensor, Tensor]:
    query, keys, values, rpb, *windows, scale, return_lse = call
    out, lse = _empty_outputs(query, values, return_lse)
    query_tokens, out_tokens = query.flatten(1, -3), out.flatten(1, -3)
    # Computed explicitly where torch's fused attention does not apply: it returns no lse, and
    # supports neither a bias of higher precision than the query nor, on the CPU, two head dims.
    explicit = return_lse or query.shape[-1] != values.shape[-1]
    explicit |= rpb is not None and rpb.dtype != query.dtype
    for tiles in _steps(query, values, windows, score_tensors=2 if explicit else 0):
        q, k, v = _gather_all(query_tokens, keys, values, tiles)
        if explicit:
            q, k, v = (tensor.to(_precise(query.dtype)).contiguous() for tensor in (q, k, v))
            scores = _scores(q * scale, k, tiles, rpb)
            _scatter(out_tokens, tiles.queries, scores.softmax(-1) @ v)
            if return_lse:
                lse_tokens = lse.flatten(1, -2).unsqueeze(-1)
                _scatter(lse_tokens, tiles.queries, scores.logsumexp(-1, keepdim=True))
        else:
            bias = _bias(tiles, rpb, q.dtype)
            out_tile = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
            _scatter(out_tokens, tiles.queries, out_tile)
    return out, lse


def _backward(
    grad_out: Tensor, grad_lse: Tensor, out: Tensor, lse: Tensor, *call: Any, needed: list[bool]
) -> list[Tensor | None]:
    """Gradients of query, keys, values and rpb."""
    query, keys, values, rpb, *windows, scale, return_lse = call
    inputs = [query, keys, values] if rpb is None else [query, keys, values, rpb]
    precise = _precise(query.dtype)
    grads = [torch.zeros(t.shape, dtype=precise, device=t.device) for t in inputs]
    query_tokens, grad_query = query.flatten(1, -3), grads[0].flatten(1, -3)
    grad_out_tokens = grad_out.flatten(1, -3)
    grad_lse_tokens = grad_lse.flatten(1, -2).unsqueeze(-1) if return_lse else None
    for tiles in _steps(query, values, windows, score_tensors=3):
        of_tile = _gather_all(query_tokens, keys, values, tiles)
        q, k, v = (t.to(precise).contiguous() for t in of_tile)
        q = q * scale
        grad = _gather(grad_out_tokens, tiles.queries).to(precise).contiguous()
        weights = _scores(q, k, tiles, rpb).softmax(-1)
        # With weights p and their gradients dp, that of a score is p·dp − p · (Σ p·dp − grad_lse).
        grad_scores = (grad @ v.mT).mul_(weights)
        total = grad_scores.sum(-1, keepdim=True)
        if grad_lse_tokens is not None:
            total -= _gather(grad_lse_tokens, tiles.queries)
        grad_scores.addcmul_(weights, total, value=-1)
        _scatter(grad_query, tiles.queries, (grad_scores @ k).mul_(scale))
        _scatter_add(grads[1], tiles.keys, grad_scores.mT @ q)
        _scatter_add(grads[2], tiles.keys, weights.mT @ grad)
        if rpb is not None:
            of_window = grad_scores[..., : tiles.visible.shape[1]].sum(0).flatten(1)
            grads[3].view(len(rpb), -1).index_add_(1, tiles.offsets.flatten(), of_window)
    return [*grads, None] if rpb is None else [*grads]


_attend = operator_with_gradients(
    "na_tiled",
    f"Tensor query, Tensor keys, Tensor values, Tensor? rpb, {PARAMS}, bool return_lse",
    _forward,
    _backward,
    lambda query, keys, values, *others: _empty_outputs(query, values, others[-1]),
    results=2,
)


def _steps(
    query: Tensor, values: Tensor, windows: Sequence[list], score_tensors: int
) -> Iterator[Tiles]:
    """The tiles of the map with the additional keys, in portions with small temporary tensors.

    ``score_tensors`` is the number of tensors of the scores' size that a step holds.
    """
    batch, *size, heads, dim = query.shape
    kernel_size, stride, dilation, is_causal = (tuple(axes) for axes in windows)
    of_map, of_all = math.prod(size), values.shape[1]
    for tiles in tiles_of_map(tuple(size), kernel_size, stride, dilation, is_causal, query.device):
        num_queries, num_keys = tiles.visible.shape
        tokens = num_keys * (dim + values.shape[-1])
        scores = score_tensors * num_queries * num_keys
        if of_all > of_map:
            additional = torch.arange(of_map, of_all, device=query.device)
            everywhere = additional.expand(len(tiles.keys), -1)
            tiles = replace(tiles, keys=torch.cat([tiles.keys, everywhere], dim=1))
        yield from tiles.steps(batch * heads * (tokens + scores))


def _gather_all(
    query: Tensor, keys: Tensor, values: Tensor, tiles: Tiles
) -> tuple[Tensor, Tensor, Tensor]:
    """Query (B·tiles, H, T, D), key and value (B·tiles, H, U + additional, …) of the tiles."""
    return _gather(query, tiles.queries), _gather(keys, tiles.keys), _gather(values, tiles.keys)


def _gather(tokens: Tensor, index: Tensor) -> Tensor:
    """Gather (B, N, H, D) by (tiles, T) → (B·tiles, H, T, D), a transposed view."""
    gathered = tokens.index_select(1, index.flatten()).unflatten(1, index.shape)
    return gathered.flatten(0, 1).transpose(1, 2)


def _scatter(tokens: Tensor, index: Tensor, tiles: Tensor) -> None:
    """Write (B·tiles, H, T, D) to the tokens (tiles, T) of (B, N, H, D)."""
    rows = tiles.transpose(1, 2).reshape(tokens.shape[0], -1, *tokens.shape[2:])
    tokens.index_copy_(1, index.flatten(), rows.to(tokens.dtype))


def _scatter_add(tokens: Tensor, index: Tensor, tiles: Tensor) -> None:
    """Add (B·tiles, H, T, D) to the tokens (tiles, T) of (B, N, H, D)."""
    rows = tiles.transpose(1, 2).reshape(tokens.shape[0], -1, *tokens.shape[2:])
    tokens.index_add_(1, index.flatten(), rows)


def _scores(scaled_query: Tensor, key: Tensor, tiles: Tiles, rpb: Tensor | None) -> Tensor:
    """(B·tiles, H, T, U + additional), −∞ for masked keys."""
    scores = scaled_query @ key.mT
    of_window = scores[..., : tiles.visible.shape[1]]
    if rpb is not None:
        of_window += rpb.flatten(1)[:, tiles.offsets].to(scores.dtype)
    if not tiles.all_visible:
        # Filled instead of added as in `_bias`, since masked keys may be NaN.
        of_window.masked_fill_(~tiles.visible, -math.inf)
    return scores


def _bias(tiles: Tiles, rpb: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The bias and mask added to the scores, (T, keys) or, per head, (H, T, keys)."""
    if rpb is not None:
        bias = rpb.flatten(1)[:, tiles.offsets].to(dtype)
    elif tiles.all_visible:
        return None
    else:
        bias = torch.zeros(tiles.visible.shape, dtype=dtype, device=tiles.visible.device)
    bias = bias.masked_fill(~tiles.visible, -math.inf)
    return F.pad(bias, (0, tiles.keys.shape[1] - tiles.visible.shape[1]))


def _empty_outputs(query: Tensor, values: Tensor, return_lse: bool) -> tuple[Tensor, Tensor]:
    """Uninitialised, contiguous out and lse; without ``return_lse``, the latter is empty."""
    out = query.new_empty(*query.shape[:-1], values.shape[-1])
    shape = query.shape[:-1] if return_lse else (0,)
    return out, query.new_empty(shape, dtype=_precise(query.dtype))


def _precise(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums and of the lse: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)
