"""Triton kernel of a tile of queries: neighborhood attention, or the gradient of the queries.

Hassani et al., "Neighborhood Attention Transformer" (CVPR 2023, https://arxiv.org/abs/2204.07143),
with the online softmax and the recomputed scores of Dao, "FlashAttention-2" (2023,
https://arxiv.org/abs/2307.08691).
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
    at_queries,
    block_counts,
    block_origin,
    covers,
    dot,
    finish_scores,
    last_of,
    load_sums,
    load_tokens,
    positions,
    program,
    seen_keys,
    store_tokens,
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


@triton.jit
def _grad_block(scores, k, v, acc, grad_out, lse, delta, PRECISION: tl.constexpr):
    p = tl.math.exp2(scores - lse[:, None])
    grad_scores = p * (dot(grad_out, tl.trans(v), PRECISION) - delta[:, None])
    acc += dot(grad_scores.to(k.dtype), k, PRECISION)
    return acc


@triton.jit(do_not_specialize=["work"])
def queries_kernel(
    q_ref, k_ref, v_ref, extra_k_ref, extra_v_ref, bias_ptr, out_ref, lse_ref,
    grad_out_ref, delta_ptr, size, heads, heads_per_kv, num_extra, scale, work,
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
    GRADIENT: tl.constexpr,
    MAY_FILL: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Output and log-sum-exp of a tile of queries or, if `GRADIENT`, their gradient as `out`."""
    batch, head, group, origin, length = program(size, heads, DILATION, TILE)
    if (origin[0] >= length[0]) | (origin[1] >= length[1]) | (origin[2] >= length[2]):
        return
    kv_head = head // heads_per_kv
    ROWS: tl.constexpr = TILE[0] * TILE[1] * TILE[2]
    query, query_valid, query_at = positions(origin, length, group, TILE, DILATION)
    q = load_tokens(q_ref, batch, head, query_at, query_valid, DIM, PADDED_DIM)
    if GRADIENT:
        grad_out = load_tokens(
            grad_out_ref, batch, head, query_at, query_valid, VALUE_DIM, PADDED_VALUE_DIM
        )
        lse, delta = load_sums(lse_ref, delta_ptr, batch, head, query_at, query_valid)
        lse *= LOG2_E

    last = last_of(origin, length, TILE)
    low, end = seen_keys(origin, last, length, KERNEL, STRIDE, CAUSAL)
    # Keys that both the first and the last query see are seen by all queries of the tile.
    common_low, common_end = seen_keys(last, origin, length, KERNEL, STRIDE, CAUSAL)
    # Rows beyond the end of an axis have no window and no entry in the bias table.
    whole = covers(origin, length, origin, TILE)
    counts = block_counts(low, end, BLOCK)

    acc = tl.zeros([ROWS, PADDED_DIM if GRADIENT else PADDED_VALUE_DIM], tl.float32)
    if not GRADIENT:
        top = tl.full([ROWS], LOWEST, tl.float32)
        total = tl.zeros([ROWS], tl.float32)
    for index in range(counts[0] * counts[1] * counts[2]):
        block = block_origin(index, low, counts, BLOCK)
        key, valid, at = positions(block, end, group, BLOCK, DILATION)
        k = load_tokens(k_ref, batch, kv_head, at, valid, DIM, PADDED_DIM)
        v = load_tokens(v_ref, batch, kv_head, at, valid, VALUE_DIM, PADDED_VALUE_DIM)
        scores = dot(q, tl.trans(k), PRECISION) * (scale * LOG2_E)
        interior = whole & covers(common_low, common_end, block, BLOCK)
        scores = finish_scores(
            scores, bias_ptr, head, query, key, length, interior,
            RANK, KERNEL, STRIDE, CAUSAL, HAS_BIAS, MAY_FILL, True,
        )  # fmt: skip
        if GRADIENT:
            acc = _grad_block(scores, k, v, acc, grad_out, lse, delta, PRECISION)
        else:
            acc, top, total = _attend_block(scores, v, acc, top, total, PRECISION)

    if HAS_EXTRA:
        COLUMNS: tl.constexpr = BLOCK[0] * BLOCK[1] * BLOCK[2]
        for start in range(0, num_extra, COLUMNS):
            extra = start + tl.arange(0, COLUMNS)
            at, valid = (0, 0, extra), extra < num_extra
            # Keys beyond the last are loaded as zeros and contribute nothing to the gradient.
            k = load_tokens(extra_k_ref, batch, kv_head, at, valid, DIM, PADDED_DIM)
            v = load_tokens(extra_v_ref, batch, kv_head, at, valid, VALUE_DIM, PADDED_VALUE_DIM)
            scores = dot(q, tl.trans(k), PRECISION) * (scale * LOG2_E)
            scores = tl.where(valid[None, :], scores, float("-inf"))
            if GRADIENT:
                acc = _grad_block(scores, k, v, acc, grad_out, lse, delta, PRECISION)
            else:
                acc, top, total = _attend_block(scores, v, acc, top, total, PRECISION)

    if GRADIENT:
        acc *= scale
        store_tokens(out_ref, batch, head, query_at, query_valid, acc, DIM, PADDED_DIM)
    else:
        # Rows beyond the end of an axis have seen no key.
        total = tl.where(query_valid, total, 1.0)
        out = acc / total[:, None]
        store_tokens(out_ref, batch, head, query_at, query_valid, out, VALUE_DIM, PADDED_VALUE_DIM)
        lse_at = at_queries(lse_ref[0], lse_ref, batch, head, query_at)
        tl.store(lse_at, (top + tl.math.log2(total)) * LN_2, mask=query_valid)
