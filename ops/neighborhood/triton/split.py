"""Triton kernels of split neighborhood attention: scores, weighted sums, and their transpose.

Hassani et al., "Neighborhood Attention Transformer" (CVPR 2023, https://arxiv.org/abs/2204.07143).
Weights are those of each query's window, [B, Z, Y, X, H, K] by their strides.
"""

# Kernel annotations are Triton's, not Python's.
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

import triton
import triton.language as tl

from ops.neighborhood.triton.geometry import (
    below,
    bias_offset,
    block_counts,
    block_origin,
    dot,
    end_keys,
    end_queries,
    first_key,
    first_keys,
    first_queries,
    head_start,
    last_of,
    load_rows,
    pairs,
    positions,
    program,
    store_rows,
    token_offsets,
    visible,
)


@triton.jit
def _along(query, key, length, KERNEL: tl.constexpr, CAUSAL: tl.constexpr):
    """Place of the key in the query's window."""
    return key - first_key(query, length, KERNEL, 1, CAUSAL)


@triton.jit
def window_places(
    query,
    key,
    length,
    KERNEL: tl.constexpr,
    CAUSAL: tl.constexpr,
    ROWS_ARE_QUERIES: tl.constexpr,
):
    """Place of each pair's key among those of the query's window, row-major over the axes."""
    q, k = pairs(query, key, ROWS_ARE_QUERIES)
    z = _along(q[0], k[0], length[0], KERNEL[0], CAUSAL[0])
    y = _along(q[1], k[1], length[1], KERNEL[1], CAUSAL[1])
    x = _along(q[2], k[2], length[2], KERNEL[2], CAUSAL[2])
    return (z * KERNEL[1] + y) * KERNEL[2] + x


@triton.jit(do_not_specialize=["work"])
def scores_kernel(
    q_ptr,
    k_ptr,
    w_ptr,
    bias_ptr,
    q_strides,
    k_strides,
    w_strides,
    size,
    heads,
    work,
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
):
    """The scores of a tile of queries; those of keys that a causal window lacks are not written."""
    batch, head, group, origin, length = program(size, heads, DILATION, TILE)
    if (origin[0] >= length[0]) | (origin[1] >= length[1]) | (origin[2] >= length[2]):
        return
    query = positions(origin, TILE)
    query_valid = below(query, length)
    q_ptr += head_start(q_strides, batch, head)
    k_ptr += head_start(k_strides, batch, head)
    w_ptr += head_start(w_strides, batch, head)
    if HAS_BIAS:
        bias_ptr += head * ((2 * KERNEL[0] - 1) * (2 * KERNEL[1] - 1) * (2 * KERNEL[2] - 1))
    q_at = token_offsets(q_strides, query, group, DILATION)
    q = load_rows(q_ptr, q_at, q_strides[5], query_valid, DIM, PADDED_DIM)
    w_at = token_offsets(w_strides, query, group, DILATION)
    low = first_keys(origin, length, KERNEL, STRIDE, CAUSAL)
    end = end_keys(last_of(origin, length, TILE), length, KERNEL, STRIDE, CAUSAL)
    counts = block_counts(low, end, BLOCK)
    for index in range(counts[0] * counts[1] * counts[2]):
        key = positions(block_origin(index, low, counts, BLOCK), BLOCK)
        key_valid = below(key, end)
        k_at = token_offsets(k_strides, key, group, DILATION)
        k = load_rows(k_ptr, k_at, k_strides[5], key_valid, DIM, PADDED_DIM)
        scores = dot(q, tl.trans(k), PRECISION)
        seen = visible(query, key, length, 3, KERNEL, STRIDE, CAUSAL, True)
        if HAS_BIAS:
            bias_at = bias_ptr + bias_offset(query, key, RANK, KERNEL, True)
            scores += tl.load(bias_at, mask=seen, other=0.0).to(tl.float32)
        places = window_places(query, key, length, KERNEL, CAUSAL, True)
        out = w_ptr + w_at[:, None] + places * w_strides[5]
        tl.store(out, scores.to(w_ptr.dtype.element_ty), mask=seen)


@triton.jit(do_not_specialize=["work"])
def mix_kernel(
    q_ptr,
    k_ptr,
    w_ptr,
    q_strides,
    k_strides,
    w_strides,
    size,
    heads,
    work,
    RANK: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    DILATION: tl.constexpr,
    CAUSAL: tl.constexpr,
    DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    PRECISION: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Writes q, for a tile of queries: the sums of the keys in their windows, times weights."""
    batch, head, group, origin, length = program(size, heads, DILATION, TILE)
    if (origin[0] >= length[0]) | (origin[1] >= length[1]) | (origin[2] >= length[2]):
        return
    ROWS: tl.constexpr = TILE[0] * TILE[1] * TILE[2]
    query = positions(origin, TILE)
    query_valid = below(query, length)
    q_ptr += head_start(q_strides, batch, head)
    k_ptr += head_start(k_strides, batch, head)
    w_ptr += head_start(w_strides, batch, head)
    w_at = token_offsets(w_strides, query, group, DILATION)
    low = first_keys(origin, length, KERNEL, STRIDE, CAUSAL)
    end = end_keys(last_of(origin, length, TILE), length, KERNEL, STRIDE, CAUSAL)
    counts = block_counts(low, end, BLOCK)
    acc = tl.zeros([ROWS, PADDED_DIM], tl.float32)
    for index in range(counts[0] * counts[1] * counts[2]):
        key = positions(block_origin(index, low, counts, BLOCK), BLOCK)
        key_valid = below(key, end)
        k_at = token_offsets(k_strides, key, group, DILATION)
        k = load_rows(k_ptr, k_at, k_strides[5], key_valid, DIM, PADDED_DIM)
        seen = visible(query, key, length, 3, KERNEL, STRIDE, CAUSAL, True)
        places = window_places(query, key, length, KERNEL, CAUSAL, True)
        w = tl.load(w_ptr + w_at[:, None] + places * w_strides[5], mask=seen, other=0.0)
        acc += dot(w, k, PRECISION)
    q_at = token_offsets(q_strides, query, group, DILATION)
    store_rows(q_ptr, q_at, q_strides[5], query_valid, acc, DIM, PADDED_DIM)


@triton.jit(do_not_specialize=["work"])
def scatter_kernel(
    q_ptr,
    k_ptr,
    w_ptr,
    q_strides,
    k_strides,
    w_strides,
    size,
    heads,
    work,
    RANK: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    DILATION: tl.constexpr,
    CAUSAL: tl.constexpr,
    DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    PRECISION: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Writes k, for a tile of keys: the sums of the queries that see them, times weights."""
    batch, head, group, origin, length = program(size, heads, DILATION, TILE)
    if (origin[0] >= length[0]) | (origin[1] >= length[1]) | (origin[2] >= length[2]):
        return
    ROWS: tl.constexpr = TILE[0] * TILE[1] * TILE[2]
    key = positions(origin, TILE)
    key_valid = below(key, length)
    q_ptr += head_start(q_strides, batch, head)
    k_ptr += head_start(k_strides, batch, head)
    w_ptr += head_start(w_strides, batch, head)
    low = first_queries(origin, length, KERNEL, STRIDE, CAUSAL)
    end = end_queries(last_of(origin, length, TILE), length, KERNEL, STRIDE, CAUSAL)
    counts = block_counts(low, end, BLOCK)
    acc = tl.zeros([ROWS, PADDED_DIM], tl.float32)
    for index in range(counts[0] * counts[1] * counts[2]):
        query = positions(block_origin(index, low, counts, BLOCK), BLOCK)
        query_valid = below(query, end)
        q_at = token_offsets(q_strides, query, group, DILATION)
        q = load_rows(q_ptr, q_at, q_strides[5], query_valid, DIM, PADDED_DIM)
        # Keys beyond the axis are seen by nobody; their rows are not stored.
        seen = visible(query, key, length, 3, KERNEL, STRIDE, CAUSAL, False) & query_valid[None, :]
        places = window_places(query, key, length, KERNEL, CAUSAL, False)
        w_at = token_offsets(w_strides, query, group, DILATION)
        w = tl.load(w_ptr + w_at[None, :] + places * w_strides[5], mask=seen, other=0.0)
        acc += dot(w, q, PRECISION)
    k_at = token_offsets(k_strides, key, group, DILATION)
    store_rows(k_ptr, k_at, k_strides[5], key_valid, acc, DIM, PADDED_DIM)
