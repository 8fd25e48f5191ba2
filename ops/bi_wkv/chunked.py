"""Differentiable bi-WKV in plain torch with O(T) time and memory, by scans in chunks of 16 tokens.

A sum of exponentials is represented by a pair: the logarithm of a scale that bounds each term
(a constant for autograd), (…, T, C), and the sums of value and of 1 relative to that scale,
(2, …, T, C).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["attend", "unavailable"]

_CHUNK = 16

Sums = tuple[Tensor, Tensor]


def unavailable(
    key: Tensor, value: Tensor, decay: Tensor, first: Tensor, segments: int | None
) -> str | None:
    """Supports every call with a known number of tokens."""
    return None if isinstance(key.shape[1], int) else "the number of tokens must not be symbolic"


def attend(
    key: Tensor, value: Tensor, decay: Tensor, first: Tensor, segments: int | None
) -> Tensor:
    """See :func:`ops.bi_wkv.bi_wkv`; all tensors have the same dtype."""
    scale = key.detach().clamp(min=_nothing(key))
    weight = (key - scale).exp()  # 1, with the gradient of the exponential
    own = scale, torch.stack([weight * value, weight])
    both_ways = _each(own, lambda x: torch.stack([x, x.flip(-2)], dim=-4))
    others = _shifted(_scan(both_ways, decay), 1)
    if segments is not None:
        others = _scaled(others, -decay)
    (scale, flipped_scale), (parts, flipped_parts) = (x.unbind(-4) for x in others)
    before, after = (scale, parts), (flipped_scale.flip(-2), flipped_parts.flip(-2))
    terms = [before, after, _scaled(own, first)]
    length = 1 if segments is None else -(-key.shape[1] // segments)
    if length > 1:
        terms += _segment_terms(own, decay, length)
    _, (numerator, denominator) = _sum(terms)
    return numerator / denominator


def _segment_terms(own: Sums, decay: Tensor, length: int) -> list[Sums]:
    """The published kernel's additional terms for the preceding tokens in the segment.

    For tokens i and t, where begin is the segment's first token: (eʷ − 1) exp(kᵢ − w(t − i)) for
    begin ≤ i < t, and −(eʷ − 1) exp(kᵢ + w(t − i)) for begin < i ≤ t.
    """
    size = own[0].shape[-2]
    cut = _cut(own, length)
    nearer = _scaled(_shifted(_scan(cut, decay), 1), -decay)
    farther = _scan(_padded(_each(cut, lambda x: x[..., 1:, :]), 1, 0), -decay)
    # eʷ − 1 is sign · e^up with no |sign| above 1.
    grows = decay > 0
    up = torch.where(grows, decay, 0)
    sign = torch.where(grows, -torch.expm1(-up), torch.expm1(torch.where(grows, 0, decay)))
    terms = []
    for factor, sums in ((sign, nearer), (-sign, farther)):
        scale, parts = _scaled(sums, up)
        terms.append(_joined((scale, factor * parts), size))
    return terms


def _scan(sums: Sums, decay: Tensor) -> Sums:
    """Prefix sums of the tokens (inclusive), decayed by e^(−decay) per step."""
    size = sums[0].shape[-2]
    if size > _CHUNK:
        # Within chunks, across chunks, and from there to the tokens of the next chunk.
        inner = _scan(_cut(sums, _CHUNK), decay)
        ends = _scan(_each(inner, lambda x: x[..., -1, :]), decay * _CHUNK)
        carried = _each(_shifted(ends, 1), lambda x: x.unsqueeze(-2))
        steps = torch.arange(1, _CHUNK + 1, device=decay.device)[:, None]
        return _joined(_sum([inner, _scaled(carried, -decay * steps)]), size)
    step = 1
    while step < size:
        sums = _sum([sums, _scaled(_shifted(sums, step), -decay * step)])
        step *= 2
    return sums


def _cut(sums: Sums, length: int) -> Sums:
    """Cut (…, T, C) into (…, pieces, length, C); the last piece is padded with empty sums."""
    padding = -sums[0].shape[-2] % length
    return _each(_padded(sums, 0, padding), lambda x: x.unflatten(-2, (-1, length)))


def _joined(sums: Sums, size: int) -> Sums:
    """Undo :func:`_cut` of ``size`` tokens."""
    return _each(sums, lambda x: x.flatten(-3, -2)[..., :size, :])


def _shifted(sums: Sums, steps: int) -> Sums:
    """The sums of the token ``steps`` earlier; empty sums at the start."""
    kept = sums[0].shape[-2] - steps
    return _padded(_each(sums, lambda x: x[..., :kept, :]), steps, 0)


def _padded(sums: Sums, before: int, behind: int) -> Sums:
    """Pad both ends of the tokens with empty sums."""
    scale, parts = sums
    room = (0, 0, before, behind)
    return F.pad(scale, room, value=_nothing(scale)), F.pad(parts, room)


def _nothing(scale: Tensor) -> float:
    """The scale of an empty sum, and of a masked token: finite, so that differences are, too."""
    return torch.finfo(scale.dtype).min / 4


def _each(sums: Sums, function: Callable[[Tensor], Tensor]) -> Sums:
    scale, parts = sums
    return function(scale), function(parts)


def _scaled(sums: Sums, exponent: Tensor) -> Sums:
    """Multiply by e^exponent; its gradient flows through the sums."""
    scale, parts = sums
    constant = exponent.detach()
    if exponent.requires_grad:
        parts = parts * (exponent - constant).exp()
    return scale + constant, parts


def _sum(terms: list[Sums]) -> Sums:
    scale = terms[0][0]
    for other, _ in terms[1:]:
        scale = torch.maximum(scale, other)
    total = terms[0][1] * (terms[0][0] - scale).exp()
    for own, parts in terms[1:]:
        total = total + parts * (own - scale).exp()
    return scale, total
