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
    finish_scores,
    in_map,
    last_of,
    load_rows,
    load_sums,
    load_tokens,
    positions,
    program,
    seeing_queries,
    seen_keys,
    store_tokens,
)


@triton.jit
def delta_kernel(
    out_ptr, grad_out_ptr, grad_lse_ptr, delta_ptr, grad_out_strides, grad_lse_strides,
    size, heads, rows,
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
    s = grad_out_strides
    grad_at = batch * s[0] + z * s[1] + y * s[2] + x * s[3] + head * s[4]
    out = load_rows(out_ptr, row * VALUE_DIM, 1, valid, VALUE_DIM, PADDED_VALUE_DIM)
    grad = load_rows(grad_out_ptr, grad_at, s[5], valid, VALUE_DIM, PADDED_VALUE_DIM)
    delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
    s = grad_lse_strides
    lse_at = batch * s[0] + z * s[1] + y * s[2] + x * s[3] + head * s[4]
    delta -= tl.load(grad_lse_ptr + lse_at, mask=valid, other=0.0)
    tl.store(delta_ptr + row, delta, mask=valid)


@triton.jit(do_not_specialize=["work"])
def grad_query_kernel(
    q_ptr, k_ptr, v_ptr, extra_k_ptr, extra_v_ptr, bias_ptr,
    grad_out_ptr, lse_ptr, delta_ptr, grad_q_ptr,
    q_strides, k_strides, v_strides, extra_k_strides, extra_v_strides,
    grad_out_strides, lse_strides, grad_q_strides,
    size, heads, heads_per_kv, num_extra, scale, work,
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
):  # fmt: skip
    """Gradient of a tile of queries; iterates over the same key blocks as the forward pass."""
    batch, head, group, origin, length = program(size, heads, DILATION, TILE)
    if (origin[0] >= length[0]) | (origin[1] >= length[1]) | (origin[2] >= length[2]):
        return
    kv_head = head // heads_per_kv
    ROWS: tl.constexpr = TILE[0] * TILE[1] * TILE[2]
    query = positions(origin, TILE)
    query_valid = below(query, length)
    query_at = in_map(query, group, DILATION)
    q = load_tokens(q_ptr, q_strides, batch, head, query_at, query_valid, DIM, PADDED_DIM)
    grad_out = load_tokens(
        *(grad_out_ptr, grad_out_strides, batch, head),
        *(query_at, query_valid, VALUE_DIM, PADDED_VALUE_DIM),
    )
    lse, delta = load_sums(lse_ptr, delta_ptr, lse_strides, batch, head, query_at, query_valid)
    lse *= LOG2_E

    last = last_of(origin, length, TILE)
    low, end = seen_keys(origin, last, length, KERNEL, STRIDE, CAUSAL)
    common_low, common_end = seen_keys(last, origin, length, KERNEL, STRIDE, CAUSAL)
    # Rows beyond the end of an axis have no window and no entry in the bias table.
    whole = covers(origin, length, origin, TILE)
    counts = block_counts(low, end, BLOCK)

    acc = tl.zeros([ROWS, PADDED_DIM], tl.float32)
    for index in range(counts[0] * counts[1] * counts[2]):
        block = block_origin(index, low, counts, BLOCK)
        key = positions(block, BLOCK)
        key_valid = below(key, end)
        key_at = in_map(key, group, DILATION)
        k = load_tokens(k_ptr, k_strides, batch, kv_head, key_at, key_valid, DIM, PADDED_DIM)
        v = load_tokens(
            v_ptr, v_strides, batch, kv_head, key_at, key_valid, VALUE_DIM, PADDED_VALUE_DIM
        )
        scores = dot(q, tl.trans(k), PRECISION) * (scale * LOG2_E)
        interior = whole & covers(common_low, common_end, block, BLOCK)
        scores = finish_scores(
            scores, bias_ptr, head, query, key, length, interior,
            RANK, KERNEL, STRIDE, CAUSAL, HAS_BIAS, MAY_FILL, True,
        )  # fmt: skip
        p = tl.math.exp2(scores - lse[:, None])
        grad_scores = p * (dot(grad_out, tl.trans(v), PRECISION) - delta[:, None])
        acc += dot(grad_scores.to(k.dtype), k, PRECISION)

    if HAS_EXTRA:
        COLUMNS: tl.constexpr = BLOCK[0] * BLOCK[1] * BLOCK[2]
        for start in range(0, num_extra, COLUMNS):
            extra = start + tl.arange(0, COLUMNS)
            at, valid = (0, 0, extra), extra < num_extra
            k = load_tokens(
                extra_k_ptr, extra_k_strides, batch, kv_head, at, valid, DIM, PADDED_DIM
            )
            v = load_tokens(
                extra_v_ptr, extra_v_strides, batch, kv_head, at, valid, VALUE_DIM, PADDED_VALUE_DIM
            )
            # Keys beyond the last are loaded as zeros and contribute nothing to the gradient.
            scores = dot(q, tl.trans(k), PRECISION) * (scale * LOG2_E)
            scores = tl.where(valid[None, :], scores, float("-inf"))
            p = tl.math.exp2(scores - lse[:, None])
            grad_scores = p * (dot(grad_out, tl.trans(v), PRECISION) - delta[:, None])
            acc += dot(grad_scores.to(k.dtype), k, PRECISION)

    acc *= scale
    store_tokens(
        grad_q_ptr, grad_q_strides, batch, head, query_at, query_valid, acc, DIM, PADDED_DIM
    )


@triton.jit(do_not_specialize=["work"])
def grad_key_value_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, grad_out_ptr, lse_ptr, delta_ptr, grad_k_ptr, grad_v_ptr,
    q_strides, k_strides, v_strides,
    grad_out_strides, lse_strides, grad_k_strides, grad_v_strides,
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
    key = positions(origin, TILE)
    key_valid = below(key, length)
    key_at = in_map(key, group, DILATION)
    k = load_tokens(k_ptr, k_strides, batch, kv_head, key_at, key_valid, DIM, PADDED_DIM)
    v = load_tokens(
        v_ptr, v_strides, batch, kv_head, key_at, key_valid, VALUE_DIM, PADDED_VALUE_DIM
    )

    last = last_of(origin, length, TILE)
    low, end = seeing_queries(origin, last, length, KERNEL, STRIDE, CAUSAL)
    counts = block_counts(low, end, BLOCK)
    blocks = counts[0] * counts[1] * counts[2]

    acc_k = tl.zeros([ROWS, PADDED_DIM], tl.float32)
    acc_v = tl.zeros([ROWS, PADDED_VALUE_DIM], tl.float32)
    for index in range(heads_per_kv * blocks):
        head = kv_head * heads_per_kv + index // blocks
        block = block_origin(index % blocks, low, counts, BLOCK)
        query = positions(block, BLOCK)
        query_valid = below(query, end)
        query_at = in_map(query, group, DILATION)
        q = load_tokens(q_ptr, q_strides, batch, head, query_at, query_valid, DIM, PADDED_DIM)
        grad_out = load_tokens(
            *(grad_out_ptr, grad_out_strides, batch, head),
            *(query_at, query_valid, VALUE_DIM, PADDED_VALUE_DIM),
        )
        lse, delta = load_sums(lse_ptr, delta_ptr, lse_strides, batch, head, query_at, query_valid)
        lse *= LOG2_E

        scores = dot(k, tl.trans(q), PRECISION) * (scale * LOG2_E)
        block_last = (block[0] + BLOCK[0] - 1, block[1] + BLOCK[1] - 1, block[2] + BLOCK[2] - 1)
        common_low, common_end = seen_keys(block_last, block, length, KERNEL, STRIDE, CAUSAL)
        interior = covers(common_low, common_end, origin, TILE) & below(block_last, length)
        scores = finish_scores(
            scores, bias_ptr, head, query, key, length, interior,
            RANK, KERNEL, STRIDE, CAUSAL, HAS_BIAS, MAY_FILL, False,
        )  # fmt: skip
        p = tl.math.exp2(scores - lse[None, :])
        acc_v += dot(p.to(grad_out.dtype), grad_out, PRECISION)
        grad_scores = p * (dot(v, tl.trans(grad_out), PRECISION) - delta[None, :])
        acc_k += dot(grad_scores.to(q.dtype), q, PRECISION)

    acc_k *= scale
    store_tokens(
        grad_k_ptr, grad_k_strides, batch, kv_head, key_at, key_valid, acc_k, DIM, PADDED_DIM
    )
    store_tokens(
        *(grad_v_ptr, grad_v_strides, batch, kv_head),
        *(key_at, key_valid, acc_v, VALUE_DIM, PADDED_VALUE_DIM),
    )
