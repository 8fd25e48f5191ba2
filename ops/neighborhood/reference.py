"""Reference implementation of neighborhood attention: gather the windows, then softmax.

Neighborhood attention: https://arxiv.org/abs/2204.07143. Supports any device, dtype and size,
including symbolic sizes; memory grows with the number of keys in a window.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ops.neighborhood._geometry import (
    Inputs,
    NAParams,
    axis_windows,
    cross_index,
    cross_mask,
    group_of,
)

__all__ = ["attend", "mix", "scores", "unavailable", "windows"]


def unavailable(*call: Any) -> str | None:
    """``None``: this backend supports every call."""
    return None


def attend(inputs: Inputs, params: NAParams) -> tuple[Tensor, Tensor]:
    """Neighborhood attention and its lse; shapes as in :mod:`ops.neighborhood`."""
    query, key, value, additional_keys, additional_values, rpb = inputs
    size, dtype = query.shape[1:-2], query.dtype
    precise = torch.promote_types(dtype, torch.float32)
    repeats = query.shape[-2] // key.shape[-2]
    keys, offsets, visible = windows(size, params, query.device)

    def tokens(tensor: Tensor, repeats: int) -> Tensor:  # (B, N, H, D)
        return tensor.to(precise).flatten(1, -3).repeat_interleave(repeats, dim=-2)

    query = tokens(query, 1) * params.scale
    key, value = tokens(key, repeats)[:, keys], tokens(value, repeats)[:, keys]  # (B, N, K, H, D)
    scores = torch.einsum("bnhd,bnkhd->bhnk", query, key)
    if rpb is not None:
        scores = scores + rpb.flatten(1)[:, offsets]
    scores = scores.masked_fill(~visible, -math.inf)
    if additional_keys is not None:
        extra = torch.einsum("bnhd,bmhd->bhnm", query, tokens(additional_keys, repeats))
        scores = torch.cat([scores, extra], dim=-1)
    weights = scores.softmax(dim=-1)
    out = torch.einsum("bhnk,bnkhd->bnhd", weights[..., : keys.shape[1]], value)
    if additional_values is not None:
        extra = weights[..., keys.shape[1] :]
        out = out + torch.einsum("bhnm,bmhd->bnhd", extra, tokens(additional_values, repeats))
    lse = scores.logsumexp(dim=-1).transpose(1, 2)
    return out.to(dtype).unflatten(1, size), lse.unflatten(1, size)


def scores(query: Tensor, key: Tensor, rpb: Tensor | None, params: NAParams) -> Tensor:
    """The scores of :mod:`ops.neighborhood.split`, −inf where a causal window has no key."""
    size, precise = query.shape[2:-1], torch.promote_types(query.dtype, torch.float32)
    keys, offsets, visible = windows(size, params, query.device)
    query, key = query.to(precise).flatten(2, -2), key.to(precise).flatten(2, -2)
    out = torch.einsum("bhnd,bhnkd->bhnk", query, key[:, :, keys])
    if rpb is not None:
        out = out + rpb.flatten(1)[:, offsets]
    return out.masked_fill(~visible, -math.inf).unflatten(2, size)


def mix(weights: Tensor, value: Tensor, params: NAParams) -> Tensor:
    """The sums of values of :mod:`ops.neighborhood.split`."""
    size, precise = value.shape[2:-1], torch.promote_types(value.dtype, torch.float32)
    keys, _, visible = windows(size, params, value.device)
    weights = weights.to(precise).flatten(2, -2).masked_fill(~visible, 0)
    gathered = value.to(precise).flatten(2, -2)[:, :, keys]
    return torch.einsum("bhnk,bhnkd->bhnd", weights, gathered).unflatten(2, size)


def windows(
    size: Sequence[int], params: NAParams, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Indices for every query (N) and key of its window (K), flattened over the axes; each (N, K).

    Returns:
        keys: token of the key. offsets: index into the flattened rpb. visible: whether the key
        exists; false only in causal windows, which may not be full.
    """
    keys = offsets = torch.zeros(1, 1, dtype=torch.long, device=device)
    visible = torch.ones(1, 1, dtype=torch.bool, device=device)

    for n, k, s, d, causal in zip(
        size, params.kernel_size, params.stride, params.dilation, params.is_causal, strict=True
    ):
        start, length = axis_windows(n, k, s, d, causal, device)
        position, step = torch.arange(n, device=device), torch.arange(k, device=device)
        place = start[:, None] + step  # (n, k)
        # Places beyond a causal window must be valid indices; they are masked.
        seen = step < length[:, None]
        place = torch.where(seen, place, start[:, None])
        keys = cross_index(keys, place * d + group_of(position, d)[:, None], n)
        offsets = cross_index(offsets, place - position[:, None] // d + k - 1, 2 * k - 1)
        visible = cross_mask(visible, seen)
    return keys, offsets, visible
