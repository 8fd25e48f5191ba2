"""Triton kernels of the selective scan, and their launch.

A program's states, [BLOCK, STATES], stay in registers from the first token to the last. The
backward pass loads the states before each chunk and recomputes those within the chunk into a
scratch buffer of the program. There are no atomics: sums over channels come apart by block, and
those over images by image, until torch adds them. A `ref` is a tensor's pointer and its strides as
(B, G, rows, L), in elements.
"""
# Kernel annotations are Triton's, not Python's.
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ops.operators import operator_with_gradients
from ops.triton_devices import LAUNCH_OPTIONS

_CHUNK = 16  # tokens between stored states
_MOST_CELLS = 1024  # states of a program


@triton.jit
def _at(ref, image, group, rows, token):
    return ref[0] + image * ref[1] + group * ref[2] + rows * ref[3] + token * ref[4]


@triton.jit
def _load(ref, image, group, rows, token, inside):
    """Rows of a token in float32; 0 where they are not `inside`."""
    return tl.load(_at(ref, image, group, rows, token), mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _softplus(z):
    """log(1 + exp(z)), exact for small exp(z), too: a rounded 1 + e has the logarithm times the
    ratio of e to what was added."""
    e = tl.exp(-tl.abs(z))
    one = 1.0 + e
    added = tl.where(one == 1.0, 1.0, one - 1.0)
    return tl.maximum(z, 0.0) + tl.where(one == 1.0, e, tl.log(one) * (e / added))


@triton.jit
def _program(groups, dim, BLOCK: tl.constexpr):
    """Image, group, channels in the group and whether they exist, of this program."""
    index = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    return index // groups, index % groups, channel, channel < dim


@triton.jit
def _rates(a_ptr, first, channel, inside, STATES: tl.constexpr, PADDED: tl.constexpr):
    """A of a program: [BLOCK, PADDED]; 0 outside."""
    state = tl.arange(0, PADDED)
    at = (first + channel)[:, None] * STATES + state[None, :]
    valid = inside[:, None] & (state < STATES)[None, :]
    return tl.load(a_ptr + at, mask=valid, other=0.0), at, valid


@triton.jit
def forward_kernel(
    u_ref, delta_ref, a_ptr, b_ref, c_ref, d_ptr, bias_ptr, out_ref, states_ptr,
    tokens, groups, dim,
    STATES: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    FOR_BACKWARD: tl.constexpr,
):  # fmt: skip
    """The output or, for the backward pass, the states before each chunk."""
    image, group, channel, inside = _program(groups, dim, BLOCK)
    first = group * dim
    rate, cell, valid = _rates(a_ptr, first, channel, inside, STATES, PADDED)
    own = tl.load(d_ptr + first + channel, mask=inside, other=0.0)
    bias = tl.load(bias_ptr + first + channel, mask=inside, other=0.0)
    number = tl.arange(0, PADDED)
    chunks = (tokens + CHUNK - 1) // CHUNK
    state = tl.zeros([BLOCK, PADDED], tl.float32)
    for t in range(tokens):
        u = _load(u_ref, image, group, channel, t, inside)
        step = _load(delta_ref, image, group, channel, t, inside) + bias
        step = _softplus(step) if SOFTPLUS else step
        before = _load(b_ref, image, group, number, t, number < STATES)
        if FOR_BACKWARD:
            place = (image * chunks + t // CHUNK) * groups * dim * STATES
            tl.store(states_ptr + place + cell, state, mask=valid & (t % CHUNK == 0))
        state = state * tl.exp(step[:, None] * rate) + (step * u)[:, None] * before[None, :]
        if not FOR_BACKWARD:
            after = _load(c_ref, image, group, number, t, number < STATES)
            out = tl.sum(state * after[None, :], 1) + own * u
            tl.store(_at(out_ref, image, group, channel, t), out, mask=inside)


@triton.jit
def backward_kernel(
    u_ref, delta_ref, a_ptr, b_ref, c_ref, d_ptr, bias_ptr, grad_ref, states_ptr, scratch_ptr,
    grad_u_ptr, grad_delta_ptr, grad_a_ptr, grad_b_ptr, grad_c_ptr, grad_d_ptr, grad_bias_ptr,
    tokens, groups, dim,
    STATES: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    SOFTPLUS: tl.constexpr,
):  # fmt: skip
    """Gradients of everything, from the last token to the first."""
    image, group, channel, inside = _program(groups, dim, BLOCK)
    first = group * dim
    rate, cell, valid = _rates(a_ptr, first, channel, inside, STATES, PADDED)
    own = tl.load(d_ptr + first + channel, mask=inside, other=0.0)
    bias = tl.load(bias_ptr + first + channel, mask=inside, other=0.0)
    number = tl.arange(0, PADDED)
    exists = number < STATES
    chunks = (tokens + CHUNK - 1) // CHUNK
    images = tl.num_programs(0) // groups
    program = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    lane = tl.arange(0, BLOCK)
    scratch_ptr += program * CHUNK * BLOCK * PADDED + lane[:, None] * PADDED + number[None, :]
    rows = (image * groups * dim + first + channel) * tokens
    shared = ((tl.program_id(1) * images + image) * groups + group) * STATES + number
    carried = tl.zeros([BLOCK, PADDED], tl.float32)
    grad_rate = tl.zeros([BLOCK, PADDED], tl.float32)
    grad_own = tl.zeros([BLOCK], tl.float32)
    grad_bias = tl.zeros([BLOCK], tl.float32)
    for done in range(chunks):
        chunk = chunks - 1 - done
        begin = chunk * CHUNK
        count = tl.minimum(CHUNK, tokens - begin)
        place = (image * chunks + chunk) * groups * dim * STATES
        state = tl.load(states_ptr + place + cell, mask=valid, other=0.0)
        for i in range(count):
            t = begin + i
            u = _load(u_ref, image, group, channel, t, inside)
            step = _load(delta_ref, image, group, channel, t, inside) + bias
            step = _softplus(step) if SOFTPLUS else step
            before = _load(b_ref, image, group, number, t, exists)
            tl.store(scratch_ptr + i * BLOCK * PADDED, state)
            state = state * tl.exp(step[:, None] * rate) + (step * u)[:, None] * before[None, :]
        tl.debug_barrier()
        for passed in range(count):
            i = count - 1 - passed
            t = begin + i
            u = _load(u_ref, image, group, channel, t, inside)
            z = _load(delta_ref, image, group, channel, t, inside) + bias
            step = _softplus(z) if SOFTPLUS else z
            before = _load(b_ref, image, group, number, t, exists)
            after = _load(c_ref, image, group, number, t, exists)
            grad = _load(grad_ref, image, group, channel, t, inside)
            earlier = tl.load(scratch_ptr + i * BLOCK * PADDED)
            decay = tl.exp(step[:, None] * rate)
            state = earlier * decay + (step * u)[:, None] * before[None, :]
            of_state = carried + grad[:, None] * after[None, :]
            # Channels outside have no gradient, so that they add nothing to these sums.
            grad_c = tl.sum(grad[:, None] * state, 0)
            grad_b = tl.sum((step * u)[:, None] * of_state, 0)
            tl.store(grad_c_ptr + shared * tokens + t, grad_c, mask=exists)
            tl.store(grad_b_ptr + shared * tokens + t, grad_b, mask=exists)
            entered = tl.sum(before[None, :] * of_state, 1)
            carried = of_state * decay
            faded = carried * earlier
            grad_rate += step[:, None] * faded
            grad_z = u * entered + tl.sum(rate * faded, 1)
            if SOFTPLUS:
                grad_z *= tl.sigmoid(z)
            grad_own += grad * u
            grad_bias += grad_z
            tl.store(grad_u_ptr + rows + t, step * entered + own * grad, mask=inside)
            tl.store(grad_delta_ptr + rows + t, grad_z, mask=inside)
        tl.debug_barrier()
    image_of = image * groups * dim
    tl.store(grad_a_ptr + image_of * STATES + cell, grad_rate, mask=valid)
    tl.store(grad_d_ptr + image_of + first + channel, grad_own, mask=inside)
    tl.store(grad_bias_ptr + image_of + first + channel, grad_bias, mask=inside)


def _common(*inputs: Any) -> tuple[dict[str, Any], tuple[int, int]]:
    """Arguments common to both kernels, and the grid."""
    u, delta, A, B, C, D, delta_bias, softplus = inputs
    batch, channels, tokens = u.shape
    groups, dim = B.shape[1], channels // B.shape[1]
    padded = triton.next_power_of_2(A.shape[1])
    block = min(triton.next_power_of_2(dim), max(1, _MOST_CELLS // padded), 64)
    rows = {"u": u.unflatten(1, (groups, dim)), "delta": delta.unflatten(1, (groups, dim))}
    strided = {**rows, "b": B, "c": C}
    dense = {"a": A, "d": D, "bias": delta_bias}
    arguments = {
        **{f"{name}_ref": (t, *t.stride()) for name, t in strided.items()},
        **{f"{name}_ptr": t.contiguous() for name, t in dense.items()},
        **{"tokens": tokens, "groups": groups, "dim": dim, "STATES": A.shape[1]},
        **{"PADDED": padded, "BLOCK": block, "CHUNK": _CHUNK, "SOFTPLUS": softplus},
    }
    return arguments, (batch * groups, triton.cdiv(dim, block))


def _forward(u: Tensor, *others: Any) -> Tensor:
    """(B, channels, L), contiguous, in the dtype of u."""
    common, grid = _common(u, *others)
    out = u.new_empty(u.shape)
    out_ref = (out, *out.unflatten(1, (common["groups"], -1)).stride())
    with torch.cuda.device_of(u):
        forward_kernel[grid](
            **common,
            **{"out_ref": out_ref, "states_ptr": None, "FOR_BACKWARD": False},
            **LAUNCH_OPTIONS,
        )
    return out


def _backward(grad_out: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    """Gradients of the seven tensors in float32."""
    common, grid = _common(*inputs)
    u, _, A, B, *_ = inputs
    batch, channels, tokens = u.shape

    def empty(*shape: int) -> Tensor:
        return u.new_empty(shape, dtype=torch.float32)

    grad_u, grad_delta = empty(*u.shape), empty(*u.shape)
    grad_a = empty(batch, *A.shape)
    grad_b, grad_c = empty(grid[1], *B.shape), empty(grid[1], *B.shape)
    grad_d, grad_bias = empty(batch, channels), empty(batch, channels)
    states = empty(batch, triton.cdiv(tokens, _CHUNK), *A.shape)
    scratch = empty(*grid, _CHUNK, common["BLOCK"], common["PADDED"])
    grad = grad_out.unflatten(1, (common["groups"], -1))
    with torch.cuda.device_of(u):
        forward_kernel[grid](
            **common,
            **{"out_ref": None, "states_ptr": states, "FOR_BACKWARD": True},
            **LAUNCH_OPTIONS,
        )
        backward_kernel[grid](
            **common,
            **{"grad_ref": (grad, *grad.stride()), "states_ptr": states},
            **{"scratch_ptr": scratch, "grad_u_ptr": grad_u, "grad_delta_ptr": grad_delta},
            **{"grad_a_ptr": grad_a, "grad_b_ptr": grad_b, "grad_c_ptr": grad_c},
            **{"grad_d_ptr": grad_d, "grad_bias_ptr": grad_bias},
            **LAUNCH_OPTIONS,
        )
    of_channels = (t.sum(0) for t in (grad_a, grad_b, grad_c, grad_d, grad_bias))
    return (grad_u, grad_delta, *of_channels)


scan = operator_with_gradients(
    "triton_selective_scan",
    "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor D, Tensor delta_bias, "
    "bool softplus",
    _forward,
    _backward,
    lambda u, *others: u.new_empty(u.shape),
)
