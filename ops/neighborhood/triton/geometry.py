"""Shared parts of the Triton kernels of neighborhood attention: windows, tiles, masks, memory.

Hassani et al., "Neighborhood Attention Transformer" (CVPR 2023, https://arxiv.org/abs/2204.07143);
strides and causal axes as in https://arxiv.org/abs/2504.16922.

All maps have three axes here (lower ranks are padded in front with axes of length 1). A program
handles a tile of one dilation group of one head: it keeps the rows of `TILE` positions in registers
and iterates over the positions they interact with, in blocks of `BLOCK`. Because windows move
monotonically along an axis, these positions form a box whose corners follow from the first and the
last position of the tile. The iteration starts at the box's low corner without any alignment, which
keeps the number of blocks small for small windows.

Coordinates are relative to the dilation group, in triples (z, y, x). Kernels get a tensor, `q_ref`,
as a tuple: its pointer, then its strides as [B, Z, Y, X, H, D], in elements. Scores are scaled by
log2(e), so that exp2 can be used.
"""
# Kernel annotations are Triton's, not Python's.
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

import triton
import triton.language as tl

# Triton's interpreter computes on NumPy arrays, which do not support bfloat16.
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# Initial running maximum: finite, so that a row that has seen no key yet yields no NaN.
LOWEST = tl.constexpr(-1.0e38)
# Upper bound of the running maximum: finite, so that the sum is NaN only if a score is NaN.
HIGHEST = tl.constexpr(3.0e38)


@triton.jit
def dot(a, b, PRECISION: tl.constexpr):
    if _INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32))
    else:
        return tl.dot(a, b, input_precision=PRECISION)


# ---------------------------------------------------------------- windows along one axis


@triton.jit
def first_key(query, length, KERNEL: tl.constexpr, STRIDE: tl.constexpr, CAUSAL: tl.constexpr):
    """First key that `query` sees; non-decreasing in `query`."""
    if CAUSAL:
        leader = tl.minimum(query // STRIDE * STRIDE + (STRIDE - 1), length - 1)
        return tl.maximum(leader - (KERNEL - 1), 0)
    else:
        leader = tl.minimum(query // STRIDE * STRIDE + STRIDE // 2, length - 1)
        return tl.minimum(tl.maximum(leader - KERNEL // 2, 0), length - KERNEL)


@triton.jit
def end_key(query, length, KERNEL: tl.constexpr, STRIDE: tl.constexpr, CAUSAL: tl.constexpr):
    """One past the last key that `query` sees; non-decreasing in `query`."""
    if CAUSAL:
        return query + 1
    else:
        return first_key(query, length, KERNEL, STRIDE, CAUSAL) + KERNEL


@triton.jit
def first_query(key, length, KERNEL: tl.constexpr, STRIDE: tl.constexpr, CAUSAL: tl.constexpr):
    """First query whose window ends after `key` (`length` if there is none)."""
    if CAUSAL:
        return key
    else:
        # The window must start at key - KERNEL + 1 or later, which bounds the leader from below.
        leader = key - (KERNEL - 1) + KERNEL // 2
        stride_block = (tl.maximum(leader - STRIDE // 2, 0) + (STRIDE - 1)) // STRIDE
        return tl.where(key < KERNEL, 0, tl.minimum(stride_block * STRIDE, length))


@triton.jit
def end_query(key, length, KERNEL: tl.constexpr, STRIDE: tl.constexpr, CAUSAL: tl.constexpr):
    """One past the last query whose window starts at `key` or before."""
    # The window must start at `key` or before, which bounds the leader from above. The last leader
    # and the last window are clamped to the axis, in which case the query is unbounded.
    if CAUSAL:
        leader = key + (KERNEL - 1)
        stride_block = (leader - (STRIDE - 1)) // STRIDE
        unbounded = leader >= length - 1
    else:
        leader = key + KERNEL // 2
        stride_block = (leader - STRIDE // 2) // STRIDE
        unbounded = (leader >= length - 1) | (key >= length - KERNEL)
    return tl.where(unbounded, length, tl.minimum((stride_block + 1) * STRIDE, length))


@triton.jit
def in_window(query, key, length, KERNEL: tl.constexpr, STRIDE: tl.constexpr, CAUSAL: tl.constexpr):
    """Whether `query` sees `key`; queries beyond the end of the axis see nothing."""
    first = first_key(query, length, KERNEL, STRIDE, CAUSAL)
    count = end_key(query, length, KERNEL, STRIDE, CAUSAL) - first
    count = tl.where(query < length, count, 0)
    # A single unsigned comparison tests both ends.
    return (key - first).to(tl.uint32) < count.to(tl.uint32)


# ---------------------------------------------------------------- triples of axes


@triton.jit
def program(size, heads, DILATION: tl.constexpr, TILE: tl.constexpr):
    """Batch, head, dilation group, first position of the tile, lengths of the group's axes."""
    tiles_z = tl.cdiv(tl.cdiv(size[0], DILATION[0]), TILE[0])
    tiles_y = tl.cdiv(tl.cdiv(size[1], DILATION[1]), TILE[1])
    tiles_x = tl.cdiv(tl.cdiv(size[2], DILATION[2]), TILE[2])
    groups = DILATION[0] * DILATION[1] * DILATION[2]
    # The tile is the fastest index, so that programs that share keys run at about the same time.
    in_head = tl.program_id(0) % (tiles_z * tiles_y * tiles_x * groups)
    batch_head = tl.program_id(0) // (tiles_z * tiles_y * tiles_x * groups)
    g = in_head % groups
    group = (
        g // (DILATION[1] * DILATION[2]),
        g // DILATION[2] % DILATION[1],
        g % DILATION[2],
    )
    t = in_head // groups
    origin = (
        t // (tiles_y * tiles_x) * TILE[0],
        t // tiles_x % tiles_y * TILE[1],
        t % tiles_x * TILE[2],
    )
    length = (
        (size[0] - group[0] + DILATION[0] - 1) // DILATION[0],
        (size[1] - group[1] + DILATION[1] - 1) // DILATION[1],
        (size[2] - group[2] + DILATION[2] - 1) // DILATION[2],
    )
    return batch_head // heads, batch_head % heads, group, origin, length


@triton.jit
def below(position, end):
    return (position[0] < end[0]) & (position[1] < end[1]) & (position[2] < end[2])


@triton.jit
def last_of(origin, length, BOX: tl.constexpr):
    return (
        tl.minimum(origin[0] + BOX[0], length[0]) - 1,
        tl.minimum(origin[1] + BOX[1], length[1]) - 1,
        tl.minimum(origin[2] + BOX[2], length[2]) - 1,
    )


@triton.jit
def seen_keys(
    first, last, length, KERNEL: tl.constexpr, STRIDE: tl.constexpr, CAUSAL: tl.constexpr
):
    """The box from the first key that `first` sees to the last one that `last` sees."""
    low = (
        first_key(first[0], length[0], KERNEL[0], STRIDE[0], CAUSAL[0]),
        first_key(first[1], length[1], KERNEL[1], STRIDE[1], CAUSAL[1]),
        first_key(first[2], length[2], KERNEL[2], STRIDE[2], CAUSAL[2]),
    )
    end = (
        end_key(last[0], length[0], KERNEL[0], STRIDE[0], CAUSAL[0]),
        end_key(last[1], length[1], KERNEL[1], STRIDE[1], CAUSAL[1]),
        end_key(last[2], length[2], KERNEL[2], STRIDE[2], CAUSAL[2]),
    )
    return low, end


@triton.jit
def seeing_queries(
    first, last, length, KERNEL: tl.constexpr, STRIDE: tl.constexpr, CAUSAL: tl.constexpr
):
    """The box of the queries that see any key from `first` to `last`."""
    low = (
        first_query(first[0], length[0], KERNEL[0], STRIDE[0], CAUSAL[0]),
        first_query(first[1], length[1], KERNEL[1], STRIDE[1], CAUSAL[1]),
        first_query(first[2], length[2], KERNEL[2], STRIDE[2], CAUSAL[2]),
    )
    end = (
        end_query(last[0], length[0], KERNEL[0], STRIDE[0], CAUSAL[0]),
        end_query(last[1], length[1], KERNEL[1], STRIDE[1], CAUSAL[1]),
        end_query(last[2], length[2], KERNEL[2], STRIDE[2], CAUSAL[2]),
    )
    return low, end


@triton.jit
def block_counts(low, end, BLOCK: tl.constexpr):
    """Blocks along each axis of the box from `low` to `end`; 0 if the box is empty."""
    return (
        tl.cdiv(tl.maximum(end[0] - low[0], 0), BLOCK[0]),
        tl.cdiv(tl.maximum(end[1] - low[1], 0), BLOCK[1]),
        tl.cdiv(tl.maximum(end[2] - low[2], 0), BLOCK[2]),
    )


@triton.jit
def block_origin(index, low, counts, BLOCK: tl.constexpr):
    return (
        low[0] + index // (counts[1] * counts[2]) * BLOCK[0],
        low[1] + index // counts[2] % counts[1] * BLOCK[1],
        low[2] + index % counts[2] * BLOCK[2],
    )


@triton.jit
def covers(low, end, origin, BLOCK: tl.constexpr):
    """Whether the box from `low` to `end` contains the whole block at `origin`."""
    return (
        (origin[0] >= low[0])
        & (origin[1] >= low[1])
        & (origin[2] >= low[2])
        & (origin[0] + BLOCK[0] <= end[0])
        & (origin[1] + BLOCK[1] <= end[1])
        & (origin[2] + BLOCK[2] <= end[2])
    )


@triton.jit
def pairs(query, key, ROWS_ARE_QUERIES: tl.constexpr):
    """Both positions, to be broadcast to the score matrix."""
    if ROWS_ARE_QUERIES:
        q = (query[0][:, None], query[1][:, None], query[2][:, None])
        k = (key[0][None, :], key[1][None, :], key[2][None, :])
    else:
        q = (query[0][None, :], query[1][None, :], query[2][None, :])
        k = (key[0][:, None], key[1][:, None], key[2][:, None])
    return q, k


@triton.jit
def visible(
    query,
    key,
    length,
    RANK: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    CAUSAL: tl.constexpr,
    ROWS_ARE_QUERIES: tl.constexpr,
):
    """Mask of the score matrix; padded axes are skipped."""
    q, k = pairs(query, key, ROWS_ARE_QUERIES)
    seen = in_window(q[2], k[2], length[2], KERNEL[2], STRIDE[2], CAUSAL[2])
    if RANK >= 2:
        seen &= in_window(q[1], k[1], length[1], KERNEL[1], STRIDE[1], CAUSAL[1])
    if RANK == 3:
        seen &= in_window(q[0], k[0], length[0], KERNEL[0], STRIDE[0], CAUSAL[0])
    return seen


@triton.jit
def bias_entries(
    ptr, head, query, key, RANK: tl.constexpr, KERNEL: tl.constexpr, ROWS_ARE_QUERIES: tl.constexpr
):
    """Pointers to each pair's entry in the bias table: linear in key and query, so separable."""
    wide_y: tl.constexpr = 2 * KERNEL[1] - 1
    wide_x: tl.constexpr = 2 * KERNEL[2] - 1
    centre: tl.constexpr = ((KERNEL[0] - 1) * wide_y + KERNEL[1] - 1) * wide_x + KERNEL[2] - 1
    q = query[2]
    k = key[2]
    if RANK >= 2:
        q += (query[0] * wide_y + query[1]) * wide_x
        k += (key[0] * wide_y + key[1]) * wide_x
    k += centre
    ptr += head * ((2 * KERNEL[0] - 1) * wide_y * wide_x)
    return ptr + (k[None, :] - q[:, None] if ROWS_ARE_QUERIES else k[:, None] - q[None, :])


@triton.jit
def finish_scores(
    scores, bias_ptr, head, query, key, length, interior,
    RANK: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    MAY_FILL: tl.constexpr,
    ROWS_ARE_QUERIES: tl.constexpr,
):  # fmt: skip
    """Add the bias, and mask pairs outside the windows unless the block is interior."""
    if HAS_BIAS:
        bias_at = bias_entries(bias_ptr, head, query, key, RANK, KERNEL, ROWS_ARE_QUERIES)
    if MAY_FILL and interior:
        if HAS_BIAS:
            scores += tl.load(bias_at).to(tl.float32) * LOG2_E
    else:
        seen = visible(query, key, length, RANK, KERNEL, STRIDE, CAUSAL, ROWS_ARE_QUERIES)
        if HAS_BIAS:
            scores += tl.load(bias_at, mask=seen, other=0.0).to(tl.float32) * LOG2_E
        scores = tl.where(seen, scores, float("-inf"))
    return scores


# ---------------------------------------------------------------- memory


@triton.jit
def in_map(position, group, DILATION: tl.constexpr):
    """Positions of a dilation group as those of the map."""
    return (
        position[0] * DILATION[0] + group[0],
        position[1] * DILATION[1] + group[1],
        position[2] * DILATION[2] + group[2],
    )


@triton.jit
def positions(origin, end, group, BOX: tl.constexpr, DILATION: tl.constexpr):
    """Those of a box, whether they are before `end`, and where they are in the map."""
    i = tl.arange(0, BOX[0] * BOX[1] * BOX[2])
    position = (
        origin[0] + i // (BOX[1] * BOX[2]),
        origin[1] + i // BOX[2] % BOX[1],
        origin[2] + i % BOX[2],
    )
    return position, below(position, end), in_map(position, group, DILATION)


@triton.jit
def at_head(ptr, ref, batch, head):
    """`ptr` at a head of an image in a tensor with the strides of `ref`."""
    # 64 bits: a tensor may have more than 2^31 elements; one head of one image may not.
    return ptr + (batch.to(tl.int64) * ref[1] + head.to(tl.int64) * ref[5])


@triton.jit
def token_offsets(ref, position):
    return position[0] * ref[2] + position[1] * ref[3] + position[2] * ref[4]


@triton.jit
def _rows(ptr, offsets, dim_stride, valid, DIM: tl.constexpr, PADDED: tl.constexpr):
    """Pointers to rows of `DIM` elements, and their mask."""
    column = tl.arange(0, PADDED)
    mask = valid[:, None] if DIM == PADDED else valid[:, None] & (column < DIM)[None, :]
    return ptr + offsets[:, None] + (column * dim_stride)[None, :], mask


@triton.jit
def load_rows(ptr, offsets, dim_stride, valid, DIM: tl.constexpr, PADDED: tl.constexpr):
    at, mask = _rows(ptr, offsets, dim_stride, valid, DIM, PADDED)
    return tl.load(at, mask=mask, other=0.0)


@triton.jit
def store_rows(ptr, offsets, dim_stride, valid, rows, DIM: tl.constexpr, PADDED: tl.constexpr):
    at, mask = _rows(ptr, offsets, dim_stride, valid, DIM, PADDED)
    tl.store(at, rows.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def load_tokens(ref, batch, head, position, valid, DIM: tl.constexpr, PADDED: tl.constexpr):
    """The rows of the tokens of a head at positions of the map."""
    ptr = at_head(ref[0], ref, batch, head)
    return load_rows(ptr, token_offsets(ref, position), ref[6], valid, DIM, PADDED)


@triton.jit
def store_tokens(ref, batch, head, position, valid, rows, DIM: tl.constexpr, PADDED: tl.constexpr):
    ptr = at_head(ref[0], ref, batch, head)
    store_rows(ptr, token_offsets(ref, position), ref[6], valid, rows, DIM, PADDED)


@triton.jit
def at_queries(ptr, ref, batch, head, position):
    """Pointers to the numbers of the queries at positions of the map, one each."""
    return at_head(ptr, ref, batch, head) + token_offsets(ref, position)


@triton.jit
def load_sums(lse_ref, delta_ptr, batch, head, position, valid):
    """The log-sum-exp and delta of the queries at positions of the map."""
    lse = tl.load(at_queries(lse_ref[0], lse_ref, batch, head, position), mask=valid, other=0.0)
    delta = tl.load(at_queries(delta_ptr, lse_ref, batch, head, position), mask=valid, other=0.0)
    return lse, delta
