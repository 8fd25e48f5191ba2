"""Triton kernels for the backward pass of neighborhood attention, without atomics.

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
    end_keys,
    end_queries,
    finish_scores,
    first_keys,
    first_queries,
    head_start,
    last_of,
    load_rows,
    positions,
    program,
    store_rows,
    token_offsets,
)


@triton.jit
def delta_kernel(
    out_ptr,
    grad_out_ptr,
    grad_lse_ptr,
    delta_ptr,
    grad_out_strides,
    grad_lse_strides,
    size,
    heads,
    rows,
    VALUE_DIM: tl.constexpr,
    PADDED_VALUE_DIM: tl.constexpr,
    HAS_GRAD_LSE: tl.constexpr,
    ROWS: tl.constexpr,
):
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
    s = grad_out_strides
    grad_at = batch * s[0] + z * s[1] + y * s[2] + x * s[3] + head * s[4]
    out = load_rows(out_ptr, row * VALUE_DIM, 1, valid, VALUE_DIM, PADDED_VALUE_DIM)
    grad = load_rows(grad_out_ptr, grad_at, s[5], valid, VALUE_DIM, PADDED_VALUE_DIM)
    delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
    if HAS_GRAD_LSE:
        s = grad_lse_strides
        lse_at = batch * s[0] + z * s[1] + y * s[2] + x * s[3] + head * s[4]
        delta -= tl.load(grad_lse_ptr + lse_at, mask=valid, other=0.0)
    tl.store(delta_ptr + row, delta, mask=valid)


@triton.jit(do_not_specialize=["work"])
def grad_query_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    extra_k_ptr,
    extra_v_ptr,
    bias_ptr,
    grad_out_ptr,
    lse_ptr,
    delta_ptr,
    grad_q_ptr,
    q_strides,
    k_strides,
    v_strides,
    extra_k_strides,
    extra_v_strides,
    grad_out_strides,
    lse_strides,
    grad_q_strides,
    size,
    heads,
    heads_per_kv,
    num_extra,
    scale,
    work,
    RANK: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    DILATION: tl.constexpr,
    CAUSAL: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    PADDED_VALUE_DIM: tl.constexpr,
    HAS_EXTRA: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    MAY_FILL: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradient of a tile of queries; iterates over the same key blocks as the forward pass."""
    batch, head, group, origin, length = program(size, heads, DILATION, TILE)
    if (origin[0] >= length[0]) | (origin[1] >= length[1]) | (origin[2] >= length[2]):
        return
    kv_head = head // heads_per_kv
    ROWS: tl.constexpr = TILE[0] * TILE[1] * TILE[2]
    query = positions(origin, TILE)
    query_valid = below(query, length)
    q_ptr += head_start(q_strides, batch, head)
    k_ptr += head_start(k_strides, batch, kv_head)
    v_ptr += head_start(v_strides, batch, kv_head)
    grad_out_ptr += head_start(grad_out_strides, batch, head)
    lse_start = head_start(lse_strides, batch, head)
    if HAS_BIAS:
        bias_ptr += head * ((2 * KERNEL[0] - 1) * (2 * KERNEL[1] - 1) * (2 * KERNEL[2] - 1))
    q_at = token_offsets(q_strides, query, group, DILATION)
    q = load_rows(q_ptr, q_at, q_strides[5], query_valid, DIM, PADDED_DIM)
    grad_at = token_offsets(grad_out_strides, query, group, DILATION)
    grad_out = load_rows(
        grad_out_ptr, grad_at, grad_out_strides[5], query_valid, VALUE_DIM, PADDED_VALUE_DIM
    )
    lse_at = lse_start + token_offsets(lse_strides, query, group, DILATION)
    lse = tl.load(lse_ptr + lse_at, mask=query_valid, other=0.0) * LOG2_E
    delta = tl.load(delta_ptr + lse_at, mask=query_valid, other=0.0)

    last = last_of(origin, length, TILE)
    low = first_keys(origin, length, KERNEL, STRIDE, CAUSAL)
    end = end_keys(last, length, KERNEL, STRIDE, CAUSAL)
    common_low = first_keys(last, length, KERNEL, STRIDE, CAUSAL)
    common_end = end_keys(origin, length, KERNEL, STRIDE, CAUSAL)
    # Rows beyond the end of an axis have no window and no entry in the bias table.
    whole = covers(origin, length, origin, TILE)
    counts = block_counts(low, end, BLOCK)

    acc = tl.zeros([ROWS, PADDED_DIM], tl.float32)
    for index in range(counts[0] * counts[1] * counts[2]):
        block = block_origin(index, low, counts, BLOCK)
        key = positions(block, BLOCK)
        key_valid = below(key, end)
        k_at = token_offsets(k_strides, key, group, DILATION)
        k = load_rows(k_ptr, k_at, k_strides[5], key_valid, DIM, PADDED_DIM)
        v_at = token_offsets(v_strides, key, group, DILATION)
        v = load_rows(v_ptr, v_at, v_strides[5], key_valid, VALUE_DIM, PADDED_VALUE_DIM)
        scores = dot(q, tl.trans(k), PRECISION) * (scale * LOG2_E)
        interior = whole & covers(common_low, common_end, block, BLOCK)
        scores = finish_scores(
            scores, bias_ptr, query, key, length, interior,
            RANK, KERNEL, STRIDE, CAUSAL, HAS_BIAS, MAY_FILL, True,
        )  # fmt: skip
        p = tl.math.exp2(scores - lse[:, None])
        grad_scores = p * (dot(grad_out, tl.trans(v), PRECISION) - delta[:, None])
        acc += dot(grad_scores.to(k.dtype), k, PRECISION)

    if HAS_EXTRA:
        COLUMNS: tl.constexpr = BLOCK[0] * BLOCK[1] * BLOCK[2]
        extra_k_ptr += batch.to(tl.int64) * extra_k_strides[0] + kv_head * extra_k_strides[2]
        extra_v_ptr += batch.to(tl.int64) * extra_v_strides[0] + kv_head * extra_v_strides[2]
        for start in range(0, num_extra, COLUMNS):
            extra = start + tl.arange(0, COLUMNS)
            valid = extra < num_extra
            k = load_rows(
                extra_k_ptr, extra * extra_k_strides[1], extra_k_strides[3], valid, DIM, PADDED_DIM
            )
            v = load_rows(
                extra_v_ptr, extra * extra_v_strides[1], extra_v_strides[3], valid,
                VALUE_DIM, PADDED_VALUE_DIM,
            )  # fmt: skip
            # Keys beyond the last are loaded as zeros and contribute nothing to the gradient.
            scores = dot(q, tl.trans(k), PRECISION) * (scale * LOG2_E)
            scores = tl.where(valid[None, :], scores, float("-inf"))
            p = tl.math.exp2(scores - lse[:, None])
            grad_scores = p * (dot(grad_out, tl.trans(v), PRECISION) - delta[:, None])
            acc += dot(grad_scores.to(k.dtype), k, PRECISION)

    grad_q_ptr += head_start(grad_q_strides, batch, head)
    out_at = token_offsets(grad_q_strides, query, group, DILATION)
    store_rows(grad_q_ptr, out_at, grad_q_strides[5], query_valid, acc * scale, DIM, PADDED_DIM)


@triton.jit(do_not_specialize=["work"])
def grad_key_value_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    bias_ptr,
    grad_out_ptr,
    lse_ptr,
    delta_ptr,
    grad_k_ptr,
    grad_v_ptr,
    q_strides,
    k_strides,
    v_strides,
    grad_out_strides,
    lse_strides,
    grad_k_strides,
    grad_v_strides,
    size,
    kv_heads,
    heads_per_kv,
    scale,
    work,
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
):
    """Gradients of a tile of keys and values; iterates over the queries that see any of them."""
    batch, kv_head, group, origin, length = program(size, kv_heads, DILATION, TILE)
    if (origin[0] >= length[0]) | (origin[1] >= length[1]) | (origin[2] >= length[2]):
        return
    ROWS: tl.constexpr = TILE[0] * TILE[1] * TILE[2]
    TABLE: tl.constexpr = (2 * KERNEL[0] - 1) * (2 * KERNEL[1] - 1) * (2 * KERNEL[2] - 1)
    key = positions(origin, TILE)
    key_valid = below(key, length)
    k_at = token_offsets(k_strides, key, group, DILATION)
    k_ptr += head_start(k_strides, batch, kv_head)
    k = load_rows(k_ptr, k_at, k_strides[5], key_valid, DIM, PADDED_DIM)
    v_at = token_offsets(v_strides, key, group, DILATION)
    v_ptr += head_start(v_strides, batch, kv_head)
    v = load_rows(v_ptr, v_at, v_strides[5], key_valid, VALUE_DIM, PADDED_VALUE_DIM)

    last = last_of(origin, length, TILE)
    low = first_queries(origin, length, KERNEL, STRIDE, CAUSAL)
    end = end_queries(last, length, KERNEL, STRIDE, CAUSAL)
    counts = block_counts(low, end, BLOCK)
    blocks = counts[0] * counts[1] * counts[2]

    acc_k = tl.zeros([ROWS, PADDED_DIM], tl.float32)
    acc_v = tl.zeros([ROWS, PADDED_VALUE_DIM], tl.float32)
    for index in range(heads_per_kv * blocks):
        head = kv_head * heads_per_kv + index // blocks
        block = block_origin(index % blocks, low, counts, BLOCK)
        query = positions(block, BLOCK)
        query_valid = below(query, end)
        q_at = token_offsets(q_strides, query, group, DILATION)
        q_head = q_ptr + head_start(q_strides, batch, head)
        q = load_rows(q_head, q_at, q_strides[5], query_valid, DIM, PADDED_DIM)
        grad_at = token_offsets(grad_out_strides, query, group, DILATION)
        grad_head = grad_out_ptr + head_start(grad_out_strides, batch, head)
        grad_out = load_rows(
            grad_head, grad_at, grad_out_strides[5], query_valid, VALUE_DIM, PADDED_VALUE_DIM
        )
        lse_at = head_start(lse_strides, batch, head)
        lse_at += token_offsets(lse_strides, query, group, DILATION)
        lse = tl.load(lse_ptr + lse_at, mask=query_valid, other=0.0) * LOG2_E
        delta = tl.load(delta_ptr + lse_at, mask=query_valid, other=0.0)

        scores = dot(k, tl.trans(q), PRECISION) * (scale * LOG2_E)
        block_last = (block[0] + BLOCK[0] - 1, block[1] + BLOCK[1] - 1, block[2] + BLOCK[2] - 1)
        common_low = first_keys(block_last, length, KERNEL, STRIDE, CAUSAL)
        common_end = end_keys(block, length, KERNEL, STRIDE, CAUSAL)
        interior = covers(common_low, common_end, origin, TILE) & below(block_last, length)
        scores = finish_scores(
            scores, bias_ptr + head * TABLE if HAS_BIAS else bias_ptr, query, key, length, interior,
            RANK, KERNEL, STRIDE, CAUSAL, HAS_BIAS, MAY_FILL, False,
        )  # fmt: skip
        p = tl.math.exp2(scores - lse[None, :])
        acc_v += dot(p.to(grad_out.dtype), grad_out, PRECISION)
        grad_scores = p * (dot(v, tl.trans(grad_out), PRECISION) - delta[None, :])
        acc_k += dot(grad_scores.to(q.dtype), q, PRECISION)

    grad_k_ptr += head_start(grad_k_strides, batch, kv_head)
    out_at = token_offsets(grad_k_strides, key, group, DILATION)
    store_rows(grad_k_ptr, out_at, grad_k_strides[5], key_valid, acc_k * scale, DIM, PADDED_DIM)
    grad_v_ptr += head_start(grad_v_strides, batch, kv_head)
    out_at = token_offsets(grad_v_strides, key, group, DILATION)
    store_rows(grad_v_ptr, out_at, grad_v_strides[5], key_valid, acc_v, VALUE_DIM, PADDED_VALUE_DIM)
