"""Triton kernels of split neighborhood attention: scores, weighted sums, and their transpose.

Hassani et al., "Neighborhood Attention Transformer" (CVPR 2023, https://arxiv.org/abs/2204.07143).
Weights are those of each query's window, [B, Z, Y, X, H, K] by their strides.
"""

# Kernel annotations are Triton's, not Python's.
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

import triton
import triton.language as tl

from ops.neighborhood.triton.geometry import (
    at_queries,
    bias_entries,
    block_counts,
    block_origin,
    dot,
    first_key,
    last_of,
    load_tokens,
    pairs,
    positions,
    program,
    seeing_queries,
    seen_keys,
    store_tokens,
    visible,
)


@triton.jit
def window_places(
    query, key, length, KERNEL: tl.constexpr, CAUSAL: tl.constexpr, ROWS_ARE_QUERIES: tl.constexpr
):
    """Place of each pair's key among those of the query's window, row-major over the axes."""
    q, k = pairs(query, key, ROWS_ARE_QUERIES)
    z = k[0] - first_key(q[0], length[0], KERNEL[0], 1, CAUSAL[0])
    y = k[1] - first_key(q[1], length[1], KERNEL[1], 1, CAUSAL[1])
    x = k[2] - first_key(q[2], length[2], KERNEL[2], 1, CAUSAL[2])
    return (z * KERNEL[1] + y) * KERNEL[2] + x


@triton.jit(do_not_specialize=["work"])
def scores_kernel(
    q_ref, k_ref, w_ref, bias_ptr, size, heads, work,
    RANK: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    DILATION: tl.constexpr,
    CAUSAL: tl.constexpr,
    DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The scores of a tile of queries; those of keys that a causal window lacks are not written."""
    batch, head, group, origin, length = program(size, heads, DILATION, TILE)
    if (origin[0] >= length[0]) | (origin[1] >= length[1]) | (origin[2] >= length[2]):
        return
    query, query_valid, query_at = positions(origin, length, group, TILE, DILATION)
    q = load_tokens(q_ref, batch, head, query_at, query_valid, DIM, PADDED_DIM)
    w_at = at_queries(w_ref[0], w_ref, batch, head, query_at)
    last = last_of(origin, length, TILE)
    low, end = seen_keys(origin, last, length, KERNEL, STRIDE, CAUSAL)
    counts = block_counts(low, end, BLOCK)
    for index in range(counts[0] * counts[1] * counts[2]):
        block = block_origin(index, low, counts, BLOCK)
        key, key_valid, key_at = positions(block, end, group, BLOCK, DILATION)
        k = load_tokens(k_ref, batch, head, key_at, key_valid, DIM, PADDED_DIM)
        scores = dot(q, tl.trans(k), PRECISION)
        seen = visible(query, key, length, RANK, KERNEL, STRIDE, CAUSAL, True)
        if HAS_BIAS:
            bias_at = bias_entries(bias_ptr, head, query, key, RANK, KERNEL, True)
            scores += tl.load(bias_at, mask=seen, other=0.0).to(tl.float32)
        places = window_places(query, key, length, KERNEL, CAUSAL, True)
        tl.store(w_at[:, None] + places * w_ref[6], scores.to(w_ref[0].dtype.element_ty), mask=seen)


@triton.jit(do_not_specialize=["work"])
def sums_kernel(
    q_ref, k_ref, w_ref, size, heads, work,
    RANK: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    DILATION: tl.constexpr,
    CAUSAL: tl.constexpr,
    DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    PRECISION: tl.constexpr,
    OF_KEYS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Weighted sums: `OF_KEYS`, of the keys in each query's window, in q; else of the queries that
    see each key, in k."""
    batch, head, group, origin, length = program(size, heads, DILATION, TILE)
    if (origin[0] >= length[0]) | (origin[1] >= length[1]) | (origin[2] >= length[2]):
        return
    ROWS: tl.constexpr = TILE[0] * TILE[1] * TILE[2]
    out_ref, in_ref = (q_ref, k_ref) if OF_KEYS else (k_ref, q_ref)
    own, own_valid, own_at = positions(origin, length, group, TILE, DILATION)
    last = last_of(origin, length, TILE)
    if OF_KEYS:
        low, end = seen_keys(origin, last, length, KERNEL, STRIDE, CAUSAL)
    else:
        low, end = seeing_queries(origin, last, length, KERNEL, STRIDE, CAUSAL)
    counts = block_counts(low, end, BLOCK)
    acc = tl.zeros([ROWS, PADDED_DIM], tl.float32)
    for index in range(counts[0] * counts[1] * counts[2]):
        block = block_origin(index, low, counts, BLOCK)
        other, other_valid, other_at = positions(block, end, group, BLOCK, DILATION)
        rows = load_tokens(in_ref, batch, head, other_at, other_valid, DIM, PADDED_DIM)
        query, key = (own, other) if OF_KEYS else (other, own)
        seen = visible(query, key, length, RANK, KERNEL, STRIDE, CAUSAL, OF_KEYS)
        if not OF_KEYS:
            # Keys beyond the axis are seen by nobody; their rows are not stored.
            seen &= other_valid[None, :]
        w_at = at_queries(w_ref[0], w_ref, batch, head, own_at if OF_KEYS else other_at)
        w_at = w_at[:, None] if OF_KEYS else w_at[None, :]
        places = window_places(query, key, length, KERNEL, CAUSAL, OF_KEYS)
        w = tl.load(w_at + places * w_ref[6], mask=seen, other=0.0)
        acc += dot(w, rows, PRECISION)
    store_tokens(out_ref, batch, head, own_at, own_valid, acc, DIM, PADDED_DIM)
