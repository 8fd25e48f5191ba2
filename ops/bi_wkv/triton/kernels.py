"""Triton kernels of bi-WKV (https://arxiv.org/abs/2403.02308), and their launches.

A sum of exponentials is represented by a scale, an exponent that bounds each term's, and the sums
relative to it. Exponents of tokens i are relative to the start of the sequence: key + decay · i for
tokens before the current one, and key − decay · i for tokens after it.
"""
# Triton determines the types of the kernels' arguments.
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ops.operators import operator_with_gradients
from ops.triton_devices import LAUNCH_OPTIONS

_BLOCK = 32  # channels of a program
_SLOTS = 6  # values that the backward kernel records per token and channel

_NOTHING = tl.constexpr(-1e30)  # the scale of an empty sum


# A sum is its scale, the sums of values and of 1, and the derivatives of both with respect to the
# decay: the sums of terms times distance. The compiler removes derivatives that nothing reads.
@triton.jit
def _empty(BLOCK: tl.constexpr):
    zero = tl.zeros([BLOCK], tl.float32)
    return zero + _NOTHING, zero, zero, zero, zero


@triton.jit
def _add(sums, exponent, x, y, dx=0.0, dy=0.0):
    scale, a, b, da, db = sums
    greatest = tl.maximum(scale, exponent)
    kept = tl.exp(scale - greatest)
    new = tl.exp(exponent - greatest)
    a, b = a * kept + x * new, b * kept + y * new
    return greatest, a, b, da * kept + dx * new, db * kept + dy * new


@triton.jit
def _add_token(sums, exponent, value):
    """One token farther from the others, add the next, whose distance is 0."""
    scale, a, b, da, db = sums
    return _add((scale, a, b, da + a, db + b), exponent, value, 1.0)


@triton.jit
def _cleared(where, sums):
    scale, a, b, da, db = sums
    scale, a, b = tl.where(where, _NOTHING, scale), tl.where(where, 0.0, a), tl.where(where, 0.0, b)
    return scale, a, b, tl.where(where, 0.0, da), tl.where(where, 0.0, db)


@triton.jit
def _note(slot, dim, mask, values):
    tl.store(slot, values[0], mask)
    tl.store(slot + dim, values[1], mask)
    tl.store(slot + 2 * dim, values[2], mask)


@triton.jit
def _noted(slot, dim, mask):
    first = tl.load(slot, mask, 0.0)
    return first, tl.load(slot + dim, mask, 0.0), tl.load(slot + 2 * dim, mask, 0.0)


@triton.jit
def _weights(decay):
    """Scale, common factor, and slopes of a segment's terms for nearer and farther tokens."""
    grows = decay > 0
    up = tl.where(grows, decay, 0.0)
    small = tl.exp(-tl.abs(decay))
    # 1 − exp(−|decay|), by its series for small values to avoid cancellation.
    size = tl.abs(decay)
    series = size * (1 - size / 2 * (1 - size / 3 * (1 - size / 4 * (1 - size / 5))))
    rest = tl.where(size < 0.1, series, 1 - small)
    factor = tl.where(grows, rest, -rest)
    return up, factor, tl.where(grows, small, 1.0), tl.where(grows, 1.0, small)


@triton.jit
def _forward_kernel(
    key, value, decay, first, out, noted,
    tokens, dim, length,
    SEGMENTS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = channel < dim
    image = tl.program_id(1).to(tl.int64) * tokens * dim
    w = tl.load(decay + channel, mask, 0.0)
    u = tl.load(first + channel, mask, 0.0)
    up, factor, _, _ = _weights(w)
    step = w * SEGMENTS
    slots = noted + image * 3 + channel

    after = _empty(BLOCK)
    for back in range(tokens):
        t = tokens - 1 - back
        _note(slots + t * 3 * dim, dim, mask, after)
        k = tl.load(key + image + t * dim + channel, mask, 0.0)
        v = tl.load(value + image + t * dim + channel, mask, 0.0)
        after = _add(after, k - w * t, v, 1.0)

    before, near, far = _empty(BLOCK), _empty(BLOCK), _empty(BLOCK)
    for t in range(tokens):
        k = tl.load(key + image + t * dim + channel, mask, 0.0)
        v = tl.load(value + image + t * dim + channel, mask, 0.0)
        scale, a, b = _noted(slots + t * 3 * dim, dim, mask)
        total = _add(_empty(BLOCK), u + k, v, 1.0)
        total = _add(total, before[0] - w * (t - 1) - step, before[1], before[2])
        total = _add(total, scale + w * (t + 1) - step, a, b)
        before = _add(before, k + w * t, v, 1.0)
        if SEGMENTS:
            begins = t % length == 0
            near = _cleared(begins, near)
            far = _cleared(begins, _add(far, k - w * t, v, 1.0))
            total = _add(total, near[0] - w * t + up, factor * near[1], factor * near[2])
            total = _add(total, far[0] + w * t + up, -factor * far[1], -factor * far[2])
            near = _add(near, k + w * t, v, 1.0)
        tl.store(out + image + t * dim + channel, total[1] / total[2], mask)


@triton.jit
def _backward_kernel(
    grad_out, key, value, decay, first, grad_key, grad_value, grad_decay, grad_first, noted,
    tokens, dim, length,
    SEGMENTS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = channel < dim
    image = tl.program_id(1).to(tl.int64) * tokens * dim
    w = tl.load(decay + channel, mask, 0.0)
    u = tl.load(first + channel, mask, 0.0)
    up, factor, near_slope, far_slope = _weights(w)
    step = w * SEGMENTS
    zero = tl.zeros([BLOCK], tl.float32)
    slots = noted + image * 6 + channel

    after = _empty(BLOCK)
    for back in range(tokens):
        t = tokens - 1 - back
        slot = slots + t * 6 * dim
        scale, a, b, da, db = after
        _note(slot, dim, mask, (scale, a, b))
        tl.store(slot + 3 * dim, da, mask)
        tl.store(slot + 4 * dim, db, mask)
        k = tl.load(key + image + t * dim + channel, mask, 0.0)
        v = tl.load(value + image + t * dim + channel, mask, 0.0)
        after = _add_token(after, k - w * t, v)

    before, near, far = _empty(BLOCK), _empty(BLOCK), _empty(BLOCK)
    earlier = _empty(BLOCK)
    of_decay = zero
    of_first = zero
    for t in range(tokens):
        k = tl.load(key + image + t * dim + channel, mask, 0.0)
        v = tl.load(value + image + t * dim + channel, mask, 0.0)
        slot = slots + t * 6 * dim
        total = _add(_empty(BLOCK), u + k, v, 1.0)
        scale, a, b, da, db = before
        total = _add(
            *(total, scale - w * (t - 1) - step, a, b, -da - a * SEGMENTS, -db - b * SEGMENTS)
        )
        scale, a, b = _noted(slot, dim, mask)
        da = tl.load(slot + 3 * dim, mask, 0.0)
        db = tl.load(slot + 4 * dim, mask, 0.0)
        total = _add(
            *(total, scale + w * (t + 1) - step, a, b, -da - a * SEGMENTS, -db - b * SEGMENTS)
        )
        before = _add_token(before, k + w * t, v)
        if SEGMENTS:
            begins = t % length == 0
            near = _cleared(begins, near)
            far = _cleared(begins, _add_token(far, k - w * t, v))
            scale, a, b, da, db = near
            total = _add(
                *(total, scale - w * t + up, factor * a, factor * b),
                *(near_slope * a - factor * da, near_slope * b - factor * db),
            )
            scale, a, b, da, db = far
            total = _add(
                *(total, scale + w * t + up, -factor * a, -factor * b),
                *(-far_slope * a - factor * da, -far_slope * b - factor * db),
            )
            near = _add_token(near, k + w * t, v)
        scale, a, b, da, db = total
        result = a / b
        grad = tl.load(grad_out + image + t * dim + channel, mask, 0.0) / b
        of_decay += grad * (da - result * db)
        of_first += grad * tl.exp(u + k - scale) * (v - result)
        # Record the token's scale and its terms of the gradients of values and weights, then the
        # accumulated terms of the tokens before it.
        _note(slot, dim, mask, (-scale, grad, -grad * result))
        _note(slot + 3 * dim, dim, mask, earlier)
        earlier = _add(earlier, w * t - scale, grad, -grad * result)
    place = tl.program_id(1) * dim + channel
    tl.store(grad_decay + place, of_decay, mask)
    tl.store(grad_first + place, of_first, mask)

    later, nearer, farther = _empty(BLOCK), _empty(BLOCK), _empty(BLOCK)
    for back in range(tokens):
        i = tokens - 1 - back
        slot = slots + i * 6 * dim
        inverse, x, y = _noted(slot, dim, mask)
        scale, a, b = _noted(slot + 3 * dim, dim, mask)
        terms = _add(_empty(BLOCK), u + inverse, x, y)
        terms = _add(terms, scale - w * (i - 1) - step, a, b)
        terms = _add(terms, later[0] + w * (i + 1) - step, later[1], later[2])
        later = _add(later, inverse - w * i, x, y)
        if SEGMENTS:
            ends = i % length == length - 1
            nearer = _cleared(ends, nearer)
            farther = _cleared(ends, farther)
            terms = _add(terms, nearer[0] + w * i + up, factor * nearer[1], factor * nearer[2])
            nearer = _add(nearer, inverse - w * i, x, y)
            farther = _add(farther, inverse + w * i, x, y)
            taken = tl.where(i % length == 0, _NOTHING, farther[0] - w * i + up)
            terms = _add(terms, taken, -factor * farther[1], -factor * farther[2])
        offset = image + i * dim + channel
        k = tl.load(key + offset, mask, 0.0)
        v = tl.load(value + offset, mask, 0.0)
        weight = tl.exp(k + terms[0])
        tl.store(grad_value + offset, weight * terms[1], mask)
        tl.store(grad_key + offset, weight * (terms[1] * v + terms[2]), mask)


def _launch(key: Tensor, segments: int) -> tuple[tuple[int, int], tuple[int, ...], bool]:
    """The grid, the kernels' size arguments, and whether there are segments."""
    batch, tokens, dim = key.shape
    length = -(-tokens // segments) if segments else 1
    return (triton.cdiv(dim, _BLOCK), batch), (tokens, dim, length), segments > 0


def _forward(key: Tensor, value: Tensor, decay: Tensor, first: Tensor, segments: int) -> Tensor:
    """(B, T, C); see :func:`ops.bi_wkv.bi_wkv`, with 0 segments instead of None."""
    key, value, decay, first = (t.contiguous() for t in (key, value, decay, first))
    out = torch.empty_like(key)
    noted = key.new_empty(3 * key.numel())
    grid, sizes, cut = _launch(key, segments)
    _forward_kernel[grid](
        *(key, value, decay, first, out, noted, *sizes),
        **{"SEGMENTS": cut, "BLOCK": _BLOCK, "num_warps": 1, **LAUNCH_OPTIONS},
    )
    return out


def _backward(
    grad_out: Tensor, key: Tensor, value: Tensor, decay: Tensor, first: Tensor, segments: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of key, value, decay and first."""
    tensors = [t.contiguous() for t in (grad_out, key, value, decay, first)]
    grad_key, grad_value = torch.empty_like(tensors[1]), torch.empty_like(tensors[2])
    image = (key.shape[0], key.shape[2])
    grads = grad_key, grad_value, key.new_empty(image), key.new_empty(image)
    noted = key.new_empty(_SLOTS * key.numel())
    grid, sizes, cut = _launch(key, segments)
    _backward_kernel[grid](
        *(*tensors, *grads, noted, *sizes),
        **{"SEGMENTS": cut, "BLOCK": _BLOCK, "num_warps": 1, **LAUNCH_OPTIONS},
    )
    return (*grads[:2], grads[2].sum(0), grads[3].sum(0))


scan = operator_with_gradients(
    "triton_bi_wkv",
    "Tensor key, Tensor value, Tensor decay, Tensor first, int segments",
    _forward,
    _backward,
    lambda key, *others: key.new_empty(key.shape),
)
