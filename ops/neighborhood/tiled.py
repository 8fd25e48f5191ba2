"""Exact tiled neighborhood attention in plain torch; the fastest backend without a compiler.

Neighborhood attention: https://arxiv.org/abs/2204.07143. Queries are divided into tiles. A tile
attends to the union of its queries' windows, with a mask that is shared by congruent tiles. The
backward pass recomputes the scores tile by tile, so that memory does not grow with the window.
Masked keys have weight zero but are read: a non-finite value affects all queries of the tiles that
read it, and so does a non-finite key, in gradients and if no lse is requested.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ops.neighborhood._geometry import INPUTS, PARAMS, NAParams
from ops.neighborhood._tiles import Tiles, tiles_of_map

__all__ = ["attend", "unavailable"]

# Maximum number of elements of a step's temporary tensors, to fit into the caches.
_STEP = 1 << 20


def unavailable(*call: Any) -> str | None:
    """``None``: this backend supports every call."""
    return None


def attend(*call: Any) -> tuple[Tensor, Tensor | None]:
    """Neighborhood attention and its lse; shapes as in :mod:`ops.neighborhood`.

    Second derivatives are not supported.
    """
    params: NAParams
    *tensors, params = call
    out, lse = _forward(*tensors, *params.of_operators, params.return_lse)
    return out, lse if params.return_lse else None


@torch.library.custom_op(
    "vision_backbones::na_tiled",
    mutates_args=(),
    schema=f"({INPUTS}, {PARAMS}, bool return_lse) -> (Tensor, Tensor)",
)
def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    additional_keys: Tensor | None,
    additional_values: Tensor | None,
    rpb: Tensor | None,
    kernel_size: list[int],
    stride: list[int],
    dilation: list[int],
    is_causal: list[bool],
    scale: float,
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    out, lse = _empty_outputs(query, value, return_lse)
    out_tokens = out.flatten(1, -3)
    tokens = _tokens(query, key, value, additional_keys, additional_values)
    # Computed explicitly where torch's fused attention does not apply: it returns no lse, and
    # supports neither a bias of higher precision than the query nor, on the CPU, two head dims.
    explicit = return_lse or query.shape[-1] != value.shape[-1]
    explicit |= rpb is not None and rpb.dtype != query.dtype
    windows = (kernel_size, stride, dilation, is_causal)
    for tiles in _steps(query, value, windows, score_tensors=2 if explicit else 0):
        tile = _gather_all(tokens, tiles)
        if explicit:
            q, k, v = (tensor.to(_precise(query.dtype)).contiguous() for tensor in tile)
            scores = _scores(q * scale, k, tiles, rpb)
            _scatter(out_tokens, tiles.queries, scores.softmax(-1) @ v)
            if return_lse:
                lse_tokens = lse.flatten(1, -2).unsqueeze(-1)
                _scatter(lse_tokens, tiles.queries, scores.logsumexp(-1, keepdim=True))
        else:
            q, k, v = tile
            bias = _bias(tiles, rpb, k.shape[-2], q.dtype)
            out_tile = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
            _scatter(out_tokens, tiles.queries, out_tile)
    return out, lse


@_forward.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    return _empty_outputs(query, value, return_lse=others[-1])


@torch.library.custom_op(
    "vision_backbones::na_tiled_backward",
    mutates_args=(),
    schema=f"({INPUTS}, {PARAMS}, Tensor grad_out, Tensor? grad_lse) -> Tensor[]",
)
def _backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    additional_keys: Tensor | None,
    additional_values: Tensor | None,
    rpb: Tensor | None,
    kernel_size: list[int],
    stride: list[int],
    dilation: list[int],
    is_causal: list[bool],
    scale: float,
    grad_out: Tensor,
    grad_lse: Tensor | None,
) -> list[Tensor]:
    """Gradients of query, key and value, followed by those of the other tensors given."""
    precise, heads = _precise(query.dtype), query.shape[-2]
    tokens = _tokens(query, key, value, additional_keys, additional_values)
    grad_out_tokens = grad_out.flatten(1, -3)
    grad_lse_tokens = None if grad_lse is None else grad_lse.flatten(1, -2).unsqueeze(-1)
    grads = _Tokens(
        _zeros_like(tokens.query, precise),
        _zeros_like(tokens.key, precise),
        _zeros_like(tokens.value, precise),
        None if tokens.extra_keys is None else _zeros_like(tokens.extra_keys, precise),
        None if tokens.extra_values is None else _zeros_like(tokens.extra_values, precise),
    )
    grad_rpb = None if rpb is None else _zeros_like(rpb, rpb.dtype)
    windows = (kernel_size, stride, dilation, is_causal)
    for tiles in _steps(query, value, windows, score_tensors=3):
        q, k, v = (t.to(precise).contiguous() for t in _gather_all(tokens, tiles))
        q = q * scale
        grad = _gather(grad_out_tokens, tiles.queries).to(precise).contiguous()
        weights = _scores(q, k, tiles, rpb).softmax(-1)
        # With weights p and their gradients dp, that of a score is p·dp − p · (Σ p·dp − grad_lse).
        grad_scores = (grad @ v.mT).mul_(weights)
        total = grad_scores.sum(-1, keepdim=True)
        if grad_lse_tokens is not None:
            total -= _gather(grad_lse_tokens, tiles.queries)
        grad_scores.addcmul_(weights, total, value=-1)
        _scatter(grads.query, tiles.queries, (grad_scores @ k).mul_(scale))
        _scatter_add(grads.key, grads.extra_keys, tiles.keys, grad_scores.mT @ q)
        _scatter_add(grads.value, grads.extra_values, tiles.keys, weights.mT @ grad)
        if grad_rpb is not None:
            of_window = grad_scores[..., : tiles.keys.shape[1]].sum(0).flatten(1)
            grad_rpb.view(heads, -1).index_add_(1, tiles.offsets.flatten(), of_window)
    of_inputs = [
        _as_input(grad, tensor)
        for grad, tensor in zip(
            grads, (query, key, value, additional_keys, additional_values), strict=True
        )
        if grad is not None and tensor is not None
    ]
    return of_inputs if grad_rpb is None else [*of_inputs, grad_rpb]


@_backward.register_fake
def _(*arguments: Any) -> list[Tensor]:
    present = (tensor for tensor in arguments[:6] if tensor is not None)
    return [tensor.new_empty(tensor.shape) for tensor in present]


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    *ctx.parameters, ctx.return_lse = inputs[6:]
    ctx.save_for_backward(*inputs[:6])


def _backward_of_op(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    inputs = ctx.saved_tensors
    of_lse = grad_lse if ctx.return_lse else None
    grads = iter(_backward(*inputs, *ctx.parameters, grad_out, of_lse))
    of_inputs = (None if tensor is None else next(grads) for tensor in inputs)
    return *of_inputs, *(None for _ in ctx.parameters), None


_forward.register_autograd(_backward_of_op, setup_context=_setup_context)


class _Tokens(NamedTuple):
    """The tensors of a call, with a flattened map and key heads repeated for the query heads.

    Tensors are (B, N, H, D) for the whole map, (B·tiles, H, T, D) for some of its tiles.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    extra_keys: Tensor | None = None
    extra_values: Tensor | None = None


def _tokens(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    additional_keys: Tensor | None,
    additional_values: Tensor | None,
) -> _Tokens:
    repeats = query.shape[-2] // key.shape[-2]

    def flat(tensor: Tensor) -> Tensor:
        tensor = tensor.flatten(1, -3)
        return tensor if repeats == 1 else tensor.repeat_interleave(repeats, dim=-2)

    return _Tokens(
        query.flatten(1, -3),
        flat(key),
        flat(value),
        None if additional_keys is None else flat(additional_keys),
        None if additional_values is None else flat(additional_values),
    )


def _as_input(grad: Tensor, tensor: Tensor) -> Tensor:
    """The gradient of an argument from that of its tokens: the adjoint of :func:`_tokens`."""
    heads = tensor.shape[-2]
    if grad.shape[-2] != heads:
        grad = grad.unflatten(-2, (heads, -1)).sum(-2)
    return grad.reshape(tensor.shape).to(tensor.dtype)


def _steps(
    query: Tensor, value: Tensor, windows: tuple[list, ...], score_tensors: int
) -> Iterator[Tiles]:
    """The tiles of the map, in portions with small temporary tensors.

    ``score_tensors`` is the number of tensors of the scores' size that a step holds.
    """
    batch, *size, heads, dim = query.shape
    kernel_size, stride, dilation, is_causal = (tuple(axes) for axes in windows)
    for tiles in tiles_of_map(tuple(size), kernel_size, stride, dilation, is_causal, query.device):
        num_queries, num_keys = tiles.visible.shape
        tokens = num_keys * (dim + value.shape[-1])
        scores = score_tensors * num_queries * num_keys
        yield from tiles.split(max(1, _STEP // (batch * heads * (tokens + scores))))


def _gather_all(tokens: _Tokens, tiles: Tiles) -> tuple[Tensor, Tensor, Tensor]:
    """Query (B·tiles, H, T, D), key and value (B·tiles, H, U + extra, …) of the tiles."""
    return (
        _gather(tokens.query, tiles.queries),
        _gather(tokens.key, tiles.keys, tokens.extra_keys),
        _gather(tokens.value, tiles.keys, tokens.extra_values),
    )


def _gather(tokens: Tensor, index: Tensor, extra: Tensor | None = None) -> Tensor:
    """Gather (B, N, H, D) by (tiles, T) → (B·tiles, H, T + extra, D), a transposed view."""
    gathered = tokens.index_select(1, index.flatten()).unflatten(1, index.shape)
    if extra is not None:
        everywhere = extra.unsqueeze(1).expand(-1, index.shape[0], -1, -1, -1)
        gathered = torch.cat([gathered, everywhere], dim=2)
    return gathered.flatten(0, 1).transpose(1, 2)


def _scatter(tokens: Tensor, index: Tensor, tiles: Tensor) -> None:
    """Write (B·tiles, H, T, D) to the tokens (tiles, T) of (B, N, H, D)."""
    rows = tiles.transpose(1, 2).reshape(tokens.shape[0], -1, *tokens.shape[2:])
    tokens.index_copy_(1, index.flatten(), rows.to(tokens.dtype))


def _scatter_add(tokens: Tensor, extra: Tensor | None, index: Tensor, tiles: Tensor) -> None:
    """Add (B·tiles, H, U + extra, D) to the tokens (tiles, U) of (B, N, H, D) and to extra."""
    num_keys = index.shape[1]
    rows = tiles[:, :, :num_keys].transpose(1, 2).reshape(tokens.shape[0], -1, *tokens.shape[2:])
    tokens.index_add_(1, index.flatten(), rows)
    if extra is not None:
        of_extra = tiles[:, :, num_keys:].unflatten(0, (tokens.shape[0], -1)).sum(1)
        extra += of_extra.transpose(1, 2)


def _scores(scaled_query: Tensor, key: Tensor, tiles: Tiles, rpb: Tensor | None) -> Tensor:
    """(B·tiles, H, T, U + extra), −∞ for masked keys."""
    scores = scaled_query @ key.mT
    of_window = scores[..., : tiles.keys.shape[1]]
    if rpb is not None:
        of_window += rpb.flatten(1)[:, tiles.offsets].to(scores.dtype)
    if not tiles.all_visible:
        # Filled instead of added as in `_bias`, since masked keys may be NaN.
        of_window.masked_fill_(~tiles.visible, -math.inf)
    return scores


def _bias(tiles: Tiles, rpb: Tensor | None, num_keys: int, dtype: torch.dtype) -> Tensor | None:
    """The bias and mask added to the scores, (T, U + extra) or, per head, (H, T, U + extra)."""
    if rpb is not None:
        bias = rpb.flatten(1)[:, tiles.offsets].to(dtype)
    elif tiles.all_visible:
        return None
    else:
        bias = torch.zeros(tiles.visible.shape, dtype=dtype, device=tiles.visible.device)
    bias = bias.masked_fill(~tiles.visible, -math.inf)
    return F.pad(bias, (0, num_keys - tiles.keys.shape[1]))


def _empty_outputs(query: Tensor, value: Tensor, return_lse: bool) -> tuple[Tensor, Tensor]:
    """Uninitialised, contiguous out and lse; without ``return_lse``, the latter is empty."""
    out = query.new_empty(*query.shape[:-1], value.shape[-1])
    shape = query.shape[:-1] if return_lse else (0,)
    return out, query.new_empty(shape, dtype=_precise(query.dtype))


def _zeros_like(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(tensor.shape, dtype=dtype, device=tensor.device)


def _precise(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums and of the lse: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)
