"""Triton kernels of the gradients of keys, values and biases, without atomics.

Hassani et al., "Neighborhood Attention Transformer" (CVPR 2023, https://arxiv.org/abs/2204.07143),
with the recomputed scores of Dao, "FlashAttention-2" (2023, https://arxiv.org/abs/2307.08691).
"""

# Kernel annotations are Triton's, not Python's.
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

import triton
import triton.language as tl

from ops.neighborhood.triton.geometry import (
    LOG2_E,
    below,
    block_counts,
    block_origin,
    covers,
    dot,
    end_key,
    finish_scores,
    first_key,
    in_map,
    in_window,
    last_of,
    load_rows,
    load_sums,
    load_tokens,
    positions,
    program,
    seeing_queries,
    seen_keys,
    store_rows,
    store_tokens,
)


@triton.jit
def delta_kernel(
    out_ptr, grad_out_ref, grad_lse_ref, delta_ptr, size, heads, rows,
    VALUE_DIM: tl.constexpr,
    PADDED_VALUE_DIM: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Sum of out * grad_out over the value dim, minus grad_lse.

    The gradient of a score is p * (grad_out · v - delta). `out` and `delta` are contiguous.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    valid = row < rows
    head = row % heads
    x = row // heads % size[2]
    y = row // heads // size[2] % size[1]
    z = row // heads // size[2] // size[1] % size[0]
    batch = row // heads // size[2] // size[1] // size[0]
    s = grad_out_ref
    grad_at = batch * s[1] + z * s[2] + y * s[3] + x * s[4] + head * s[5]
    out = load_rows(out_ptr, row * VALUE_DIM, 1, valid, VALUE_DIM, PADDED_VALUE_DIM)
    grad = load_rows(s[0], grad_at, s[6], valid, VALUE_DIM, PADDED_VALUE_DIM)
    delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
    s = grad_lse_ref
    lse_at = batch * s[1] + z * s[2] + y * s[3] + x * s[4] + head * s[5]
    delta -= tl.load(s[0] + lse_at, mask=valid, other=0.0)
    tl.store(delta_ptr + row, delta, mask=valid)


@triton.jit
def _add_block(acc_k, acc_v, scores, v, q, grad_out, lse, delta, PRECISION: tl.constexpr):
    """Add what a block of queries gives to the gradients of keys and values."""
    p = tl.math.exp2(scores - lse[None, :])
    acc_v += dot(p.to(grad_out.dtype), grad_out, PRECISION)
    grad_scores = p * (dot(v, tl.trans(grad_out), PRECISION) - delta[None, :])
    acc_k += dot(grad_scores.to(q.dtype), q, PRECISION)
    return acc_k, acc_v


@triton.jit(do_not_specialize=["work"])
def grad_key_value_kernel(
    q_ref, k_ref, v_ref, bias_ptr, grad_out_ref, lse_ref, delta_ptr, grad_k_ref, grad_v_ref,
    size, kv_heads, heads_per_kv, scale, work,
    RANK: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    DILATION: tl.constexpr,
    CAUSAL: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    PADDED_VALUE_DIM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    MAY_FILL: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of keys and values; iterates over the queries that see any of them."""
    batch, kv_head, group, origin, length = program(size, kv_heads, DILATION, TILE)
    if (origin[0] >= length[0]) | (origin[1] >= length[1]) | (origin[2] >= length[2]):
        return
    ROWS: tl.constexpr = TILE[0] * TILE[1] * TILE[2]
    key, key_valid, key_at = positions(origin, length, group, TILE, DILATION)
    k = load_tokens(k_ref, batch, kv_head, key_at, key_valid, DIM, PADDED_DIM)
    v = load_tokens(v_ref, batch, kv_head, key_at, key_valid, VALUE_DIM, PADDED_VALUE_DIM)

    last = last_of(origin, length, TILE)
    low, end = seeing_queries(origin, last, length, KERNEL, STRIDE, CAUSAL)
    counts = block_counts(low, end, BLOCK)
    blocks = counts[0] * counts[1] * counts[2]

    acc_k = tl.zeros([ROWS, PADDED_DIM], tl.float32)
    acc_v = tl.zeros([ROWS, PADDED_VALUE_DIM], tl.float32)
    for index in range(heads_per_kv * blocks):
        head = kv_head * heads_per_kv + index // blocks
        block = block_origin(index % blocks, low, counts, BLOCK)
        query, query_valid, query_at = positions(block, end, group, BLOCK, DILATION)
        q = load_tokens(q_ref, batch, head, query_at, query_valid, DIM, PADDED_DIM)
        grad_out = load_tokens(
            grad_out_ref, batch, head, query_at, query_valid, VALUE_DIM, PADDED_VALUE_DIM
        )
        lse, delta = load_sums(lse_ref, delta_ptr, batch, head, query_at, query_valid)
        lse *= LOG2_E

        scores = dot(k, tl.trans(q), PRECISION) * (scale * LOG2_E)
        block_last = (block[0] + BLOCK[0] - 1, block[1] + BLOCK[1] - 1, block[2] + BLOCK[2] - 1)
        common_low, common_end = seen_keys(block_last, block, length, KERNEL, STRIDE, CAUSAL)
        interior = covers(common_low, common_end, origin, TILE) & below(block_last, length)
        scores = finish_scores(
            scores, bias_ptr, head, query, key, length, interior,
            RANK, KERNEL, STRIDE, CAUSAL, HAS_BIAS, MAY_FILL, False,
        )  # fmt: skip
        acc_k, acc_v = _add_block(acc_k, acc_v, scores, v, q, grad_out, lse, delta, PRECISION)

    acc_k *= scale
    store_tokens(grad_k_ref, batch, kv_head, key_at, key_valid, acc_k, DIM, PADDED_DIM)
    store_tokens(grad_v_ref, batch, kv_head, key_at, key_valid, acc_v, VALUE_DIM, PADDED_VALUE_DIM)


# ---- gradients shared by all queries -------------------------------------------------------------
@triton.jit
def grad_extra_kernel(
    q_ref, extra_k_ref, extra_v_ref, grad_out_ref, lse_ref, delta_ptr, partial_k_ptr, partial_v_ptr,
    size, batches, kv_heads, heads_per_kv, num_extra, splits, scale,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    PADDED_VALUE_DIM: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Gradients of the additional keys and values, which every query attends to.

    There are few additional keys and many queries, so the queries are split among programs. The
    partial sums, [splits, B, N, H_kv, D] and contiguous, are added afterwards in a fixed order.
    """
    pid = tl.program_id(0)
    tiles = tl.cdiv(num_extra, ROWS)
    extra = pid % tiles * ROWS + tl.arange(0, ROWS)
    split = pid // tiles % splits
    kv_head = pid // tiles // splits % kv_heads
    batch = pid // tiles // splits // kv_heads
    valid = extra < num_extra
    at = (0, 0, extra)
    k = load_tokens(extra_k_ref, batch, kv_head, at, valid, DIM, PADDED_DIM)
    v = load_tokens(extra_v_ref, batch, kv_head, at, valid, VALUE_DIM, PADDED_VALUE_DIM)
    tokens = size[0] * size[1] * size[2]
    blocks = tl.cdiv(tl.cdiv(tokens, COLUMNS), splits)
    acc_k = tl.zeros([ROWS, PADDED_DIM], tl.float32)
    acc_v = tl.zeros([ROWS, PADDED_VALUE_DIM], tl.float32)
    for index in range(heads_per_kv * blocks):
        head = kv_head * heads_per_kv + index // blocks
        token = (split * blocks + index % blocks) * COLUMNS + tl.arange(0, COLUMNS)
        token_valid = token < tokens
        token_at = (token // (size[1] * size[2]), token // size[2] % size[1], token % size[2])
        q = load_tokens(q_ref, batch, head, token_at, token_valid, DIM, PADDED_DIM)
        grad_out = load_tokens(
            grad_out_ref, batch, head, token_at, token_valid, VALUE_DIM, PADDED_VALUE_DIM
        )
        lse, delta = load_sums(lse_ref, delta_ptr, batch, head, token_at, token_valid)
        lse *= LOG2_E
        scores = dot(k, tl.trans(q), PRECISION) * (scale * LOG2_E)
        scores = tl.where(valid[:, None] & token_valid[None, :], scores, float("-inf"))
        acc_k, acc_v = _add_block(acc_k, acc_v, scores, v, q, grad_out, lse, delta, PRECISION)
    row = ((split * batches + batch).to(tl.int64) * num_extra + extra) * kv_heads + kv_head
    store_rows(partial_k_ptr, row * DIM, 1, valid, acc_k * scale, DIM, PADDED_DIM)
    store_rows(partial_v_ptr, row * VALUE_DIM, 1, valid, acc_v, VALUE_DIM, PADDED_VALUE_DIM)


@triton.jit
def grad_bias_kernel(
    q_ref, k_ref, v_ref, bias_ptr, grad_out_ref, lse_ref, delta_ptr, partial_ptr,
    size, batches, heads, heads_per_kv, splits, scale,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    DILATION: tl.constexpr,
    CAUSAL: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    PADDED_VALUE_DIM: tl.constexpr,
    PRECISION: tl.constexpr,
    SPAN: tl.constexpr,
):  # fmt: skip
    """Gradient of the relative position bias, summed without atomics in a fixed order.

    Each program handles one head, one distance from query to key along z and y, and one distance
    between a span of keys and its span of queries along x. The distances along x then form the same
    [SPAN, SPAN] matrix for all lines of all images, so the score gradients are accumulated in
    place, and summing the diagonals once at the end gives the table's entries. Entry l of a
    program's 2 * SPAN partial sums belongs to the distance
    (spans_away - 1) * SPAN + l - (KERNEL_x - 1).
    """
    wide_z: tl.constexpr = 2 * KERNEL[0] - 1
    wide_y: tl.constexpr = 2 * KERNEL[1] - 1
    wide_x: tl.constexpr = 2 * KERNEL[2] - 1
    SPANS: tl.constexpr = (wide_x - 1 + SPAN + SPAN - 1) // SPAN
    pid = tl.program_id(0)
    spans_away = pid % SPANS
    table_y = pid // SPANS % wide_y
    table_z = pid // (SPANS * wide_y) % wide_z
    head = pid // (SPANS * wide_y * wide_z) % heads
    split = pid // (SPANS * wide_y * wide_z) // heads
    kv_head = head // heads_per_kv
    bias_ptr += ((head * wide_z + table_z) * wide_y + table_y) * wide_x

    tiles = tl.cdiv(tl.cdiv(size[2], DILATION[2]), SPAN)
    lines = batches * size[0] * size[1] * DILATION[2] * tiles
    per_split = tl.cdiv(lines, splits)
    span = tl.arange(0, SPAN)
    acc = tl.zeros([SPAN, SPAN], tl.float32)
    for line in range(split * per_split, tl.minimum((split + 1) * per_split, lines)):
        query_x0 = line % tiles * SPAN
        key_x0 = query_x0 - (KERNEL[2] - 1) + spans_away * SPAN
        image_line = line // (tiles * DILATION[2])
        z = image_line // size[1] % size[0]
        y = image_line % size[1]
        batch = image_line // size[1] // size[0]
        group = (z % DILATION[0], y % DILATION[1], line // tiles % DILATION[2])
        length = (
            (size[0] - group[0] + DILATION[0] - 1) // DILATION[0],
            (size[1] - group[1] + DILATION[1] - 1) // DILATION[1],
            (size[2] - group[2] + DILATION[2] - 1) // DILATION[2],
        )
        query_z = z // DILATION[0]
        query_y = y // DILATION[1]
        key_z = query_z + table_z - (KERNEL[0] - 1)
        key_y = query_y + table_y - (KERNEL[1] - 1)
        last_x = tl.minimum(query_x0 + SPAN, length[2]) - 1
        low_x = first_key(query_x0, length[2], KERNEL[2], STRIDE[2], CAUSAL[2])
        end_x = end_key(last_x, length[2], KERNEL[2], STRIDE[2], CAUSAL[2])
        meets = in_window(query_z, key_z, length[0], KERNEL[0], STRIDE[0], CAUSAL[0])
        meets &= in_window(query_y, key_y, length[1], KERNEL[1], STRIDE[1], CAUSAL[1])
        meets &= (last_x >= query_x0) & (low_x < key_x0 + SPAN) & (end_x > key_x0)
        if meets:
            query = (query_z, query_y, query_x0 + span)
            key = (key_z, key_y, key_x0 + span)
            query_valid = query[2] < length[2]
            key_valid = (key[2] >= 0) & (key[2] < length[2])
            query_at, key_at = in_map(query, group, DILATION), in_map(key, group, DILATION)
            q = load_tokens(q_ref, batch, head, query_at, query_valid, DIM, PADDED_DIM)
            k = load_tokens(k_ref, batch, kv_head, key_at, key_valid, DIM, PADDED_DIM)
            v = load_tokens(v_ref, batch, kv_head, key_at, key_valid, VALUE_DIM, PADDED_VALUE_DIM)
            grad_out = load_tokens(
                grad_out_ref, batch, head, query_at, query_valid, VALUE_DIM, PADDED_VALUE_DIM
            )
            lse, delta = load_sums(lse_ref, delta_ptr, batch, head, query_at, query_valid)

            query_x = query[2][:, None]
            key_x = key[2][None, :]
            seen = in_window(query_x, key_x, length[2], KERNEL[2], STRIDE[2], CAUSAL[2])
            bias_at = bias_ptr + (key_x - query_x + (KERNEL[2] - 1))
            bias = tl.load(bias_at, mask=seen, other=0.0).to(tl.float32)
            scores = dot(q, tl.trans(k), PRECISION) * scale + bias
            scores = tl.where(seen, scores, float("-inf"))
            p = tl.math.exp2((scores - lse[:, None]) * LOG2_E)
            acc += p * (dot(grad_out, tl.trans(v), PRECISION) - delta[:, None])

    partial_ptr += pid.to(tl.int64) * (2 * SPAN)
    diagonal = span[None, :] - span[:, None] + SPAN
    for entry in range(2 * SPAN):
        tl.store(partial_ptr + entry, tl.sum(tl.where(diagonal == entry, acc, 0.0)))
