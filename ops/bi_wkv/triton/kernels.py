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

from ops.triton_devices import LAUNCH_OPTIONS
from ops.triton_operators import operator_with_gradients

_BLOCK = 32  # channels of a program
_SLOTS = 6  # values that the backward kernel records per token and channel

_NOTHING = tl.constexpr(-1e30)  # the scale of an empty sum


@triton.jit
def _add(scale, a, b, exponent, x, y):
    greatest = tl.maximum(scale, exponent)
    kept = tl.exp(scale - greatest)
    new = tl.exp(exponent - greatest)
    return greatest, a * kept + x * new, b * kept + y * new


@triton.jit
def _add_four(scale, a, b, c, d, exponent, x, y, z, w):
    greatest = tl.maximum(scale, exponent)
    kept = tl.exp(scale - greatest)
    new = tl.exp(exponent - greatest)
    return greatest, a * kept + x * new, b * kept + y * new, c * kept + z * new, d * kept + w * new


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
    key,
    value,
    decay,
    first,
    out,
    noted,
    tokens,
    dim,
    length,
    SEGMENTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = channel < dim
    image = tl.program_id(1).to(tl.int64) * tokens * dim
    w = tl.load(decay + channel, mask, 0.0)
    u = tl.load(first + channel, mask, 0.0)
    up, factor, _, _ = _weights(w)
    step = w * SEGMENTS
    zero = tl.zeros([BLOCK], tl.float32)
    nothing = zero + _NOTHING
    slots = noted + image * 3 + channel

    scale, a, b = nothing, zero, zero
    for back in range(tokens):
        t = tokens - 1 - back
        slot = slots + t * 3 * dim
        tl.store(slot, scale, mask)
        tl.store(slot + dim, a, mask)
        tl.store(slot + 2 * dim, b, mask)
        k = tl.load(key + image + t * dim + channel, mask, 0.0)
        v = tl.load(value + image + t * dim + channel, mask, 0.0)
        scale, a, b = _add(scale, a, b, k - w * t, v, zero + 1)

    scale, a, b = nothing, zero, zero
    near, near_a, near_b = nothing, zero, zero
    far, far_a, far_b = nothing, zero, zero
    for t in range(tokens):
        k = tl.load(key + image + t * dim + channel, mask, 0.0)
        v = tl.load(value + image + t * dim + channel, mask, 0.0)
        slot = slots + t * 3 * dim
        after = tl.load(slot, mask, 0.0)
        after_a = tl.load(slot + dim, mask, 0.0)
        after_b = tl.load(slot + 2 * dim, mask, 0.0)
        all_, all_a, all_b = _add(nothing, zero, zero, u + k, v, zero + 1)
        all_, all_a, all_b = _add(all_, all_a, all_b, scale - w * (t - 1) - step, a, b)
        all_, all_a, all_b = _add(all_, all_a, all_b, after + w * (t + 1) - step, after_a, after_b)
        scale, a, b = _add(scale, a, b, k + w * t, v, zero + 1)
        if SEGMENTS:
            begins = t % length == 0
            near = tl.where(begins, nothing, near)
            near_a = tl.where(begins, zero, near_a)
            near_b = tl.where(begins, zero, near_b)
            far, far_a, far_b = _add(far, far_a, far_b, k - w * t, v, zero + 1)
            far = tl.where(begins, nothing, far)
            far_a = tl.where(begins, zero, far_a)
            far_b = tl.where(begins, zero, far_b)
            all_, all_a, all_b = _add(
                all_, all_a, all_b, near - w * t + up, factor * near_a, factor * near_b
            )
            all_, all_a, all_b = _add(
                all_, all_a, all_b, far + w * t + up, -factor * far_a, -factor * far_b
            )
            near, near_a, near_b = _add(near, near_a, near_b, k + w * t, v, zero + 1)
        tl.store(out + image + t * dim + channel, all_a / all_b, mask)


@triton.jit
def _backward_kernel(
    grad_out,
    key,
    value,
    decay,
    first,
    grad_key,
    grad_value,
    grad_decay,
    grad_first,
    noted,
    tokens,
    dim,
    length,
    SEGMENTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = channel < dim
    image = tl.program_id(1).to(tl.int64) * tokens * dim
    w = tl.load(decay + channel, mask, 0.0)
    u = tl.load(first + channel, mask, 0.0)
    up, factor, near_slope, far_slope = _weights(w)
    step = w * SEGMENTS
    zero = tl.zeros([BLOCK], tl.float32)
    one = zero + 1
    nothing = zero + _NOTHING
    slots = noted + image * 6 + channel

    # With each sum, its derivative with respect to the decay: the sum of terms times distance.
    scale, a, b, da, db = nothing, zero, zero, zero, zero
    for back in range(tokens):
        t = tokens - 1 - back
        slot = slots + t * 6 * dim
        tl.store(slot, scale, mask)
        tl.store(slot + dim, a, mask)
        tl.store(slot + 2 * dim, b, mask)
        tl.store(slot + 3 * dim, da, mask)
        tl.store(slot + 4 * dim, db, mask)
        k = tl.load(key + image + t * dim + channel, mask, 0.0)
        v = tl.load(value + image + t * dim + channel, mask, 0.0)
        scale, a, b, da, db = _add_four(scale, a, b, da + a, db + b, k - w * t, v, one, zero, zero)

    scale, a, b, da, db = nothing, zero, zero, zero, zero
    near, near_a, near_b, near_da, near_db = nothing, zero, zero, zero, zero
    far, far_a, far_b, far_da, far_db = nothing, zero, zero, zero, zero
    earlier, earlier_a, earlier_b = nothing, zero, zero
    of_decay = zero
    of_first = zero
    for t in range(tokens):
        k = tl.load(key + image + t * dim + channel, mask, 0.0)
        v = tl.load(value + image + t * dim + channel, mask, 0.0)
        slot = slots + t * 6 * dim
        after = tl.load(slot, mask, 0.0)
        after_a = tl.load(slot + dim, mask, 0.0)
        after_b = tl.load(slot + 2 * dim, mask, 0.0)
        after_da = tl.load(slot + 3 * dim, mask, 0.0)
        after_db = tl.load(slot + 4 * dim, mask, 0.0)
        all_, all_a, all_b, all_da, all_db = _add_four(
            nothing, zero, zero, zero, zero, u + k, v, one, zero, zero
        )
        all_, all_a, all_b, all_da, all_db = _add_four(
            *(all_, all_a, all_b, all_da, all_db),
            *(scale - w * (t - 1) - step, a, b, -da - a * SEGMENTS, -db - b * SEGMENTS),
        )
        all_, all_a, all_b, all_da, all_db = _add_four(
            *(all_, all_a, all_b, all_da, all_db),
            *(after + w * (t + 1) - step, after_a, after_b),
            *(-after_da - after_a * SEGMENTS, -after_db - after_b * SEGMENTS),
        )
        scale, a, b, da, db = _add_four(scale, a, b, da + a, db + b, k + w * t, v, one, zero, zero)
        if SEGMENTS:
            begins = t % length == 0
            near = tl.where(begins, nothing, near)
            near_a = tl.where(begins, zero, near_a)
            near_b = tl.where(begins, zero, near_b)
            near_da = tl.where(begins, zero, near_da)
            near_db = tl.where(begins, zero, near_db)
            far, far_a, far_b, far_da, far_db = _add_four(
                far, far_a, far_b, far_da + far_a, far_db + far_b, k - w * t, v, one, zero, zero
            )
            far = tl.where(begins, nothing, far)
            far_a = tl.where(begins, zero, far_a)
            far_b = tl.where(begins, zero, far_b)
            far_da = tl.where(begins, zero, far_da)
            far_db = tl.where(begins, zero, far_db)
            all_, all_a, all_b, all_da, all_db = _add_four(
                *(all_, all_a, all_b, all_da, all_db),
                *(near - w * t + up, factor * near_a, factor * near_b),
                *(near_slope * near_a - factor * near_da, near_slope * near_b - factor * near_db),
            )
            all_, all_a, all_b, all_da, all_db = _add_four(
                *(all_, all_a, all_b, all_da, all_db),
                *(far + w * t + up, -factor * far_a, -factor * far_b),
                *(-far_slope * far_a - factor * far_da, -far_slope * far_b - factor * far_db),
            )
            near, near_a, near_b, near_da, near_db = _add_four(
                near,
                near_a,
                near_b,
                near_da + near_a,
                near_db + near_b,
                k + w * t,
                v,
                one,
                zero,
                zero,
            )
        result = all_a / all_b
        grad = tl.load(grad_out + image + t * dim + channel, mask, 0.0) / all_b
        of_decay += grad * (all_da - result * all_db)
        of_first += grad * tl.exp(u + k - all_) * (v - result)
        # Record the token's scale and its terms of the gradients of values and weights, then the
        # accumulated terms of the tokens before it.
        tl.store(slot, -all_, mask)
        tl.store(slot + dim, grad, mask)
        tl.store(slot + 2 * dim, -grad * result, mask)
        tl.store(slot + 3 * dim, earlier, mask)
        tl.store(slot + 4 * dim, earlier_a, mask)
        tl.store(slot + 5 * dim, earlier_b, mask)
        earlier, earlier_a, earlier_b = _add(
            earlier, earlier_a, earlier_b, w * t - all_, grad, -grad * result
        )
    place = tl.program_id(1) * dim + channel
    tl.store(grad_decay + place, of_decay, mask)
    tl.store(grad_first + place, of_first, mask)

    later, later_a, later_b = nothing, zero, zero
    near, near_a, near_b = nothing, zero, zero
    far, far_a, far_b = nothing, zero, zero
    for back in range(tokens):
        i = tokens - 1 - back
        slot = slots + i * 6 * dim
        inverse = tl.load(slot, mask, 0.0)
        x = tl.load(slot + dim, mask, 0.0)
        y = tl.load(slot + 2 * dim, mask, 0.0)
        earlier = tl.load(slot + 3 * dim, mask, 0.0)
        earlier_a = tl.load(slot + 4 * dim, mask, 0.0)
        earlier_b = tl.load(slot + 5 * dim, mask, 0.0)
        all_, all_a, all_b = _add(nothing, zero, zero, u + inverse, x, y)
        all_, all_a, all_b = _add(
            all_, all_a, all_b, earlier - w * (i - 1) - step, earlier_a, earlier_b
        )
        all_, all_a, all_b = _add(all_, all_a, all_b, later + w * (i + 1) - step, later_a, later_b)
        later, later_a, later_b = _add(later, later_a, later_b, inverse - w * i, x, y)
        if SEGMENTS:
            ends = i % length == length - 1
            near = tl.where(ends, nothing, near)
            near_a = tl.where(ends, zero, near_a)
            near_b = tl.where(ends, zero, near_b)
            far = tl.where(ends, nothing, far)
            far_a = tl.where(ends, zero, far_a)
            far_b = tl.where(ends, zero, far_b)
            all_, all_a, all_b = _add(
                all_, all_a, all_b, near + w * i + up, factor * near_a, factor * near_b
            )
            near, near_a, near_b = _add(near, near_a, near_b, inverse - w * i, x, y)
            far, far_a, far_b = _add(far, far_a, far_b, inverse + w * i, x, y)
            taken = tl.where(i % length == 0, nothing, far - w * i + up)
            all_, all_a, all_b = _add(all_, all_a, all_b, taken, -factor * far_a, -factor * far_b)
        offset = image + i * dim + channel
        k = tl.load(key + offset, mask, 0.0)
        v = tl.load(value + offset, mask, 0.0)
        weight = tl.exp(k + all_)
        tl.store(grad_value + offset, weight * all_a, mask)
        tl.store(grad_key + offset, weight * (all_a * v + all_b), mask)


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
