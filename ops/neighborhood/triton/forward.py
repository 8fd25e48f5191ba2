"""Triton kernel for the forward pass of neighborhood attention.

Hassani et al., "Neighborhood Attention Transformer" (CVPR 2023, https://arxiv.org/abs/2204.07143),
with the online softmax of Dao, "FlashAttention-2" (2023, https://arxiv.org/abs/2307.08691).
"""

# Kernel annotations are Triton's, not Python's.
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

import triton
import triton.language as tl

from ops.neighborhood.triton.geometry import (
    HIGHEST,
    LN_2,
    LOG2_E,
    LOWEST,
    below,
    block_counts,
    block_origin,
    covers,
    dot,
    end_keys,
    finish_scores,
    first_keys,
    head_start,
    last_of,
    load_rows,
    positions,
    program,
    store_rows,
    token_offsets,
)


@triton.jit
def _attend_block(scores, v, acc, top, total, PRECISION: tl.constexpr):
    """One step of the online softmax."""
    new_top = tl.minimum(tl.maximum(top, tl.max(scores, 1)), HIGHEST)
    p = tl.math.exp2(scores - new_top[:, None])
    shrink = tl.math.exp2(top - new_top)
    total = total * shrink + tl.sum(p, 1)
    acc = acc * shrink[:, None] + dot(p.to(v.dtype), v, PRECISION)
    return acc, new_top, total


@triton.jit(do_not_specialize=["work"])
def forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    extra_k_ptr,
    extra_v_ptr,
    bias_ptr,
    out_ptr,
    lse_ptr,
    q_strides,
    k_strides,
    v_strides,
    extra_k_strides,
    extra_v_strides,
    out_strides,
    lse_strides,
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
    """Output and log-sum-exp of a tile of queries."""
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
    if HAS_BIAS:
        bias_ptr += head * ((2 * KERNEL[0] - 1) * (2 * KERNEL[1] - 1) * (2 * KERNEL[2] - 1))
    q_at = token_offsets(q_strides, query, group, DILATION)
    q = load_rows(q_ptr, q_at, q_strides[5], query_valid, DIM, PADDED_DIM)

    last = last_of(origin, length, TILE)
    low = first_keys(origin, length, KERNEL, STRIDE, CAUSAL)
    end = end_keys(last, length, KERNEL, STRIDE, CAUSAL)
    # Keys that both the first and the last query see are seen by all queries of the tile.
    common_low = first_keys(last, length, KERNEL, STRIDE, CAUSAL)
    common_end = end_keys(origin, length, KERNEL, STRIDE, CAUSAL)
    # Rows beyond the end of an axis have no window and no entry in the bias table.
    whole = covers(origin, length, origin, TILE)
    counts = block_counts(low, end, BLOCK)

    acc = tl.zeros([ROWS, PADDED_VALUE_DIM], tl.float32)
    top = tl.full([ROWS], LOWEST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
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
        acc, top, total = _attend_block(scores, v, acc, top, total, PRECISION)

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
            scores = dot(q, tl.trans(k), PRECISION) * (scale * LOG2_E)
            scores = tl.where(valid[None, :], scores, float("-inf"))
            acc, top, total = _attend_block(scores, v, acc, top, total, PRECISION)

    out_ptr += head_start(out_strides, batch, head)
    out_at = token_offsets(out_strides, query, group, DILATION)
    # Rows beyond the end of an axis have seen no key.
    total = tl.where(query_valid, total, 1.0)
    acc = acc / total[:, None]
    store_rows(out_ptr, out_at, out_strides[5], query_valid, acc, VALUE_DIM, PADDED_VALUE_DIM)
    lse_ptr += head_start(lse_strides, batch, head)
    lse_at = token_offsets(lse_strides, query, group, DILATION)
    tl.store(lse_ptr + lse_at, (top + tl.math.log2(total)) * LN_2, mask=query_valid)
