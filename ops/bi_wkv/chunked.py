"""Differentiable bi-WKV in plain torch with O(T) time and memory, by scans in chunks of 16 tokens.

A sum of exponentials is represented by a triple: the logarithm of a scale that bounds each term
(a constant for autograd), and the sums of value and of 1 relative to that scale.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["attend", "supports"]

_CHUNK = 16

Sums = tuple[Tensor, Tensor, Tensor]


def supports(
    key: Tensor, value: Tensor, decay: Tensor, first: Tensor, segments: int | None
) -> str | None:
    """Supports every call with a known number of tokens."""
    return None if isinstance(key.shape[1], int) else "the number of tokens must not be symbolic"


def attend(
    key: Tensor, value: Tensor, decay: Tensor, first: Tensor, segments: int | None
) -> Tensor:
    """See :func:`ops.bi_wkv.bi_wkv`; all tensors have the same dtype."""
    scale = key.detach()
    weight = (key - scale).exp()  # 1, with the gradient of the exponential
    own = scale, weight * value, weight
    before = _shifted(_scan(own, decay), 1)
    after = _each(_shifted(_scan(_each(own, _flipped), decay), 1), _flipped)
    itself = _scaled(own, first)
    if segments is None:
        terms = [before, after, itself]
    else:
        terms = [_scaled(before, -decay), _scaled(after, -decay), itself]
        length = -(-key.shape[1] // segments)
        if length > 1:
            terms += _segment_terms(own, decay, length)
    _, numerator, denominator = _sum(terms)
    return numerator / denominator


def _flipped(x: Tensor) -> Tensor:
    return x.flip(1)


def _segment_terms(own: Sums, decay: Tensor, length: int) -> list[Sums]:
    """The published kernel's additional terms for the preceding tokens in the segment.

    For tokens i and t, where begin is the segment's first token: (eʷ − 1) exp(kᵢ − w(t − i)) for
    begin ≤ i < t, and −(eʷ − 1) exp(kᵢ + w(t − i)) for begin < i ≤ t.
    """
    batch, size, dim = own[0].shape
    cut = _each(_padded(own, 0, -size % length), lambda x: x.reshape(-1, length, dim))
    nearer = _scaled(_shifted(_scan(cut, decay), 1), -decay)
    farther = _scan(_padded(_each(cut, lambda x: x[:, 1:]), 1, 0), -decay)
    # eʷ − 1 is sign · e^up with no |sign| above 1.
    grows = decay > 0
    up = torch.where(grows, decay, 0)
    sign = torch.where(grows, -torch.expm1(-up), torch.expm1(torch.where(grows, 0, decay)))
    terms = []
    for factor, sums in ((sign, nearer), (-sign, farther)):
        scale, numerator, denominator = _scaled(sums, up)
        sums = scale, factor * numerator, factor * denominator
        terms.append(_each(sums, lambda x: x.reshape(batch, -1, dim)[:, :size]))
    return terms


def _scan(sums: Sums, decay: Tensor) -> Sums:
    """Prefix sums along axis 1 (inclusive), decayed by e^(−decay) per step."""
    rows, size, dim = sums[0].shape
    if size > _CHUNK:
        # Within chunks, across chunks, and from there to the tokens of the next chunk.
        chunks = _each(_padded(sums, 0, -size % _CHUNK), lambda x: x.reshape(-1, _CHUNK, dim))
        inner = _each(_scan(chunks, decay), lambda x: x.reshape(rows, -1, _CHUNK, dim))
        ends = _scan(_each(inner, lambda x: x[:, :, -1]), decay * _CHUNK)
        carried = _each(_shifted(ends, 1), lambda x: x[:, :, None])
        steps = torch.arange(1, _CHUNK + 1, device=decay.device)[:, None]
        whole = _sum([inner, _scaled(carried, -decay * steps)])
        return _each(whole, lambda x: x.reshape(rows, -1, dim)[:, :size])
    step = 1
    while step < size:
        sums = _sum([sums, _scaled(_shifted(sums, step), -decay * step)])
        step *= 2
    return sums


def _shifted(sums: Sums, steps: int) -> Sums:
    """The sums of the token ``steps`` earlier; empty sums at the start."""
    kept = sums[0].shape[1] - steps
    return _padded(_each(sums, lambda x: x[:, :kept]), steps, 0)


def _padded(sums: Sums, before: int, behind: int) -> Sums:
    """Pad both ends of axis 1 with empty sums."""
    room = (0, 0, before, behind)
    scale, numerator, denominator = sums
    nothing = torch.finfo(scale.dtype).min / 4
    return F.pad(scale, room, value=nothing), F.pad(numerator, room), F.pad(denominator, room)


def _each(sums: Sums, function: Callable[[Tensor], Tensor]) -> Sums:
    scale, numerator, denominator = sums
    return function(scale), function(numerator), function(denominator)


def _scaled(sums: Sums, exponent: Tensor) -> Sums:
    """Multiply by e^exponent; its gradient flows through the sums."""
    scale, numerator, denominator = sums
    constant = exponent.detach()
    one = (exponent - constant).exp()
    return scale + constant, numerator * one, denominator * one


def _sum(terms: list[Sums]) -> Sums:
    scale = terms[0][0]
    for other, _, _ in terms[1:]:
        scale = torch.maximum(scale, other)
    factors = [(own - scale).exp() for own, _, _ in terms]
    numerator = sum(f * part for f, (_, part, _) in zip(factors, terms, strict=True))
    denominator = sum(f * part for f, (_, _, part) in zip(factors, terms, strict=True))
    assert isinstance(numerator, Tensor) and isinstance(denominator, Tensor)
    return scale, numerator, denominator
