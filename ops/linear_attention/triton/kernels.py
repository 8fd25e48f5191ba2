"""Triton kernels of gated linear attention: each program scans a block of a head's values.

https://arxiv.org/abs/2312.06635. A program's state, (K, BLOCK), stays in registers from the first
token to the last. The backward pass loads the state before each chunk and recomputes those within
the chunk into a scratch buffer of the program. There are no atomics.

A `ref` is a tensor's pointer and its strides as (B, L, H, C), in elements. Results are float32 and
contiguous, separate for each direction and, if they are sums over blocks of values, for each block.
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
_MOST_CELLS = 2048  # largest state of a program, in elements


@triton.jit
def _row(ref, batch, token, head, at, inside):
    """Channels `at` of a token, in float32; 0 where they are not `inside`."""
    ptr = ref[0] + (batch * ref[1] + token * ref[2] + head * ref[3])
    return tl.load(ptr + at * ref[4], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _gate(gate_ref, back_ref, direction, batch, token, head, at, inside):
    """Log gates of a token in a direction."""
    if direction == 1:
        gate = _row(back_ref, batch, token, head, at, inside)
    else:
        gate = _row(gate_ref, batch, token, head, at, inside)
    return gate


@triton.jit
def _step(state, gate, key, value):
    return state * tl.exp(gate)[:, None] + key[:, None] * value[None, :]


@triton.jit
def _program(batches, heads):
    """Block of values, direction, image and head of this program."""
    index = tl.program_id(0).to(tl.int64)
    head = index % heads
    batch = index // heads % batches
    return tl.program_id(1), index // (heads * batches), batch, head


@triton.jit
def _token(i, tokens, direction):
    """The `i`-th token of a direction."""
    return i + direction * (tokens - 1 - 2 * i)


@triton.jit
def forward_kernel(
    q_ref, k_ref, v_ref, gate_ref, back_ref, out_ptr, grad_ref, grad_q_ptr, states_ptr,
    batches, tokens, heads, scale,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    APART: tl.constexpr,
    FOR_BACKWARD: tl.constexpr,
):  # fmt: skip
    """The output or, for the backward pass, query gradients and the state before each chunk."""
    block, direction, batch, head = _program(batches, heads)
    channel = tl.arange(0, PADDED_DIM)
    column = block * BLOCK + tl.arange(0, BLOCK)
    valid, inside = channel < DIM, column < VALUE_DIM
    image = (direction * batches + batch) * tokens  # results are in token order
    chunks = (tokens + CHUNK - 1) // CHUNK
    program = (direction * batches + batch) * heads + head
    state = tl.zeros([PADDED_DIM, BLOCK], tl.float32)
    for i in range(tokens):
        token = _token(i, tokens, direction)
        k = _row(k_ref, batch, token, head, channel, valid)
        v = _row(v_ref, batch, token, head, column, inside)
        gate = _gate(gate_ref, back_ref, direction, batch, token, head, channel, valid)
        if FOR_BACKWARD:
            place = (program * chunks + i // CHUNK) * DIM
            at = (place + channel)[:, None] * VALUE_DIM + column[None, :]
            mask = valid[:, None] & inside[None, :] & (i % CHUNK == 0)
            tl.store(states_ptr + at, state, mask=mask)
        before = state
        state = _step(state, gate, k, v)
        seen = before if APART else state
        place = (image + token) * heads + head
        if FOR_BACKWARD:
            grad = _row(grad_ref, batch, token, head, column, inside)
            grad_q = tl.sum(seen * grad[None, :], 1) * scale
            place += block * 2 * batches * tokens * heads
            tl.store(grad_q_ptr + place * DIM + channel, grad_q, mask=valid)
        else:
            q = _row(q_ref, batch, token, head, channel, valid)
            out = tl.sum(seen * q[:, None], 0) * scale
            tl.store(out_ptr + place * VALUE_DIM + column, out, mask=inside)


@triton.jit
def backward_kernel(
    q_ref, k_ref, v_ref, gate_ref, back_ref, grad_ref, states_ptr, scratch_ptr,
    grad_k_ptr, grad_v_ptr, grad_gate_ptr,
    batches, tokens, heads, scale,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    APART: tl.constexpr,
):  # fmt: skip
    """Gradients of keys, values and gates, from the last token of a direction to its first."""
    block, direction, batch, head = _program(batches, heads)
    channel = tl.arange(0, PADDED_DIM)
    lane = tl.arange(0, BLOCK)
    column = block * BLOCK + lane
    valid, inside = channel < DIM, column < VALUE_DIM
    image = (direction * batches + batch) * tokens
    blocks = tl.num_programs(1)
    chunks = (tokens + CHUNK - 1) // CHUNK
    program = (direction * batches + batch) * heads + head
    scratch_ptr += (program * blocks + block) * CHUNK * PADDED_DIM * BLOCK
    cell = channel[:, None] * BLOCK + lane[None, :]
    grad_state = tl.zeros([PADDED_DIM, BLOCK], tl.float32)
    for done in range(chunks):
        chunk = chunks - 1 - done
        first = chunk * CHUNK
        count = tl.minimum(CHUNK, tokens - first)
        at = ((program * chunks + chunk) * DIM + channel)[:, None] * VALUE_DIM + column[None, :]
        mask = valid[:, None] & inside[None, :]
        state = tl.load(states_ptr + at, mask=mask, other=0.0)
        for i in range(count):
            token = _token(first + i, tokens, direction)
            k = _row(k_ref, batch, token, head, channel, valid)
            v = _row(v_ref, batch, token, head, column, inside)
            gate = _gate(gate_ref, back_ref, direction, batch, token, head, channel, valid)
            tl.store(scratch_ptr + i * PADDED_DIM * BLOCK + cell, state)
            state = _step(state, gate, k, v)
        tl.debug_barrier()
        for passed in range(count):
            i = count - 1 - passed
            token = _token(first + i, tokens, direction)
            q = _row(q_ref, batch, token, head, channel, valid) * scale
            k = _row(k_ref, batch, token, head, channel, valid)
            v = _row(v_ref, batch, token, head, column, inside)
            grad = _row(grad_ref, batch, token, head, column, inside)
            gate = _gate(gate_ref, back_ref, direction, batch, token, head, channel, valid)
            decay = tl.exp(gate)
            before = tl.load(scratch_ptr + i * PADDED_DIM * BLOCK + cell)
            own = q[:, None] * grad[None, :]
            if not APART:
                grad_state += own
            place = (image + token) * heads + head
            grad_v = tl.sum(grad_state * k[:, None], 0)
            tl.store(grad_v_ptr + place * VALUE_DIM + column, grad_v, mask=inside)
            place += block * 2 * batches * tokens * heads
            grad_k = tl.sum(grad_state * v[None, :], 1)
            tl.store(grad_k_ptr + place * DIM + channel, grad_k, mask=valid)
            grad_gate = tl.sum(grad_state * before, 1) * decay
            tl.store(grad_gate_ptr + place * DIM + channel, grad_gate, mask=valid)
            grad_state = grad_state * decay[:, None]
            if APART:
                grad_state += own
        tl.debug_barrier()


def _common(*inputs: Any) -> tuple[dict[str, Any], tuple[int, int]]:
    """Arguments common to all kernels, and the grid."""
    query, key, value, gate, back, apart, scale = inputs
    batches, tokens, heads, dim = query.shape
    padded = max(16, triton.next_power_of_2(dim))
    block = min(max(16, triton.next_power_of_2(value.shape[-1])), max(16, _MOST_CELLS // padded))
    named = {"q": query, "k": key, "v": value, "gate": gate, "back": gate if back is None else back}
    arguments = {
        **{f"{name}_ref": (t, *t.stride()) for name, t in named.items()},
        **{"batches": batches, "tokens": tokens, "heads": heads, "scale": scale},
        **{"DIM": dim, "VALUE_DIM": value.shape[-1], "PADDED_DIM": padded, "BLOCK": block},
        **{"CHUNK": _CHUNK, "APART": apart},
    }
    directions = 1 if back is None else 2
    return arguments, (directions * batches * heads, triton.cdiv(value.shape[-1], block))


def _forward(*inputs: Any) -> Tensor:
    """The sum of the directions: (B, L, H, V) in float32."""
    common, grid = _common(*inputs)
    _, _, value, _, back, *_ = inputs
    directions = 1 if back is None else 2
    out = value.new_empty(directions, *value.shape, dtype=torch.float32)
    with torch.cuda.device_of(value):
        forward_kernel[grid](
            **common,
            **{"out_ptr": out, "grad_ref": None, "grad_q_ptr": None, "states_ptr": None},
            **{"FOR_BACKWARD": False},
            **LAUNCH_OPTIONS,
        )
    return out.sum(0)


def _backward(
    grad_out: Tensor, *inputs: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of the five tensors in float32."""
    common, grid = _common(*inputs)
    query, _, value, _, back, *_ = inputs
    batches, tokens, heads, dim = query.shape
    directions = 1 if back is None else 2
    value_dim, blocks = value.shape[-1], grid[1]

    def empty(*shape: int) -> Tensor:
        return query.new_empty(shape, dtype=torch.float32)

    # Kernels always index two directions.
    of_keys = (blocks, 2, batches, tokens, heads, dim)
    grad_query, grad_key, grad_gate = (empty(*of_keys) for _ in range(3))
    grad_value = empty(directions, batches, tokens, heads, value_dim)
    states = empty(grid[0], triton.cdiv(tokens, _CHUNK), dim, value_dim)
    scratch = empty(grid[0], blocks, _CHUNK, common["PADDED_DIM"], common["BLOCK"])
    gradient = {"grad_ref": (grad_out, *grad_out.stride()), "states_ptr": states}
    with torch.cuda.device_of(query):
        forward_kernel[grid](
            **common,
            **gradient,
            **{"out_ptr": None, "grad_q_ptr": grad_query, "FOR_BACKWARD": True},
            **LAUNCH_OPTIONS,
        )
        backward_kernel[grid](
            **common,
            **gradient,
            **{"scratch_ptr": scratch, "grad_k_ptr": grad_key, "grad_v_ptr": grad_value},
            **{"grad_gate_ptr": grad_gate},
            **LAUNCH_OPTIONS,
        )
    of_query, of_key = (g[:, :directions].sum((0, 1)) for g in (grad_query, grad_key))
    of_gate = grad_gate[:, 0].sum(0)
    of_back = None if back is None else grad_gate[:, 1].sum(0)
    return of_query, of_key, grad_value.sum(0), of_gate, of_back


gated_scan = operator_with_gradients(
    "triton_gated_scan",
    "Tensor query, Tensor key, Tensor value, Tensor gate, Tensor? back, bool apart, float scale",
    _forward,
    _backward,
    lambda query, key, value, *others: value.new_empty(value.shape, dtype=torch.float32),
)
