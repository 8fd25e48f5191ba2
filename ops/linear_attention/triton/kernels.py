"""Triton kernels of gated linear attention: each program scans a block of a head's values.

https://arxiv.org/abs/2312.06635. A program's state, (K, BLOCK), stays in registers from the first
token to the last. The backward pass loads the state before each chunk and recomputes those within
the chunk into a scratch buffer of the program. There are no atomics.

Strides are those of (B, L, H, C) tensors, in elements. Results are float32 and contiguous, separate
for each direction and, if they are sums over blocks of values, for each block.
"""
# Kernel annotations are Triton's, not Python's.
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

import triton
import triton.language as tl


@triton.jit
def _row(ptr, strides, batch, token, head, at, inside):
    """Channels `at` of a token, in float32; 0 where they are not `inside`."""
    ptr += batch * strides[0] + token * strides[1] + head * strides[2]
    return tl.load(ptr + at * strides[3], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _gate(
    gate_ptr, back_ptr, gate_strides, back_strides, direction, batch, token, head, at, inside
):  # fmt: skip
    """Log gates of a token in a direction."""
    if direction == 1:
        gate = _row(back_ptr, back_strides, batch, token, head, at, inside)
    else:
        gate = _row(gate_ptr, gate_strides, batch, token, head, at, inside)
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
    q_ptr, k_ptr, v_ptr, gate_ptr, back_ptr, out_ptr, grad_ptr, grad_q_ptr, states_ptr,
    q_strides, k_strides, v_strides, gate_strides, back_strides, grad_strides,
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
        k = _row(k_ptr, k_strides, batch, token, head, channel, valid)
        v = _row(v_ptr, v_strides, batch, token, head, column, inside)
        gate = _gate(
            gate_ptr, back_ptr, gate_strides, back_strides,
            direction, batch, token, head, channel, valid,
        )  # fmt: skip
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
            grad = _row(grad_ptr, grad_strides, batch, token, head, column, inside)
            grad_q = tl.sum(seen * grad[None, :], 1) * scale
            place += block * 2 * batches * tokens * heads
            tl.store(grad_q_ptr + place * DIM + channel, grad_q, mask=valid)
        else:
            q = _row(q_ptr, q_strides, batch, token, head, channel, valid)
            out = tl.sum(seen * q[:, None], 0) * scale
            tl.store(out_ptr + place * VALUE_DIM + column, out, mask=inside)


@triton.jit
def backward_kernel(
    q_ptr, k_ptr, v_ptr, gate_ptr, back_ptr, grad_ptr, states_ptr, scratch_ptr,
    grad_k_ptr, grad_v_ptr, grad_gate_ptr,
    q_strides, k_strides, v_strides, gate_strides, back_strides, grad_strides,
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
            k = _row(k_ptr, k_strides, batch, token, head, channel, valid)
            v = _row(v_ptr, v_strides, batch, token, head, column, inside)
            gate = _gate(
                gate_ptr, back_ptr, gate_strides, back_strides,
                direction, batch, token, head, channel, valid,
            )  # fmt: skip
            tl.store(scratch_ptr + i * PADDED_DIM * BLOCK + cell, state)
            state = _step(state, gate, k, v)
        tl.debug_barrier()
        for passed in range(count):
            i = count - 1 - passed
            token = _token(first + i, tokens, direction)
            q = _row(q_ptr, q_strides, batch, token, head, channel, valid) * scale
            k = _row(k_ptr, k_strides, batch, token, head, channel, valid)
            v = _row(v_ptr, v_strides, batch, token, head, column, inside)
            grad = _row(grad_ptr, grad_strides, batch, token, head, column, inside)
            gate = _gate(
                gate_ptr, back_ptr, gate_strides, back_strides,
                direction, batch, token, head, channel, valid,
            )  # fmt: skip
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
