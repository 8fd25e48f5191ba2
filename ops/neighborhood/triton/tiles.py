"""Tile sizes of the Triton kernels of neighborhood attention, and which of them fit a GPU.

Neighborhood attention: https://arxiv.org/abs/2204.07143.
"""

from __future__ import annotations

import math
from typing import Any

import triton

# With more shared memory per program, too few programs run on a multiprocessor.
_SHARED_BYTES = 96 * 1024

Triple = tuple[int, int, int]


def padded(dim: int) -> int:
    """The smallest width of a matrix product with room for ``dim`` columns."""
    return max(16, triton.next_power_of_2(dim))


def may_fill_queries(keywords: dict[str, Any]) -> bool:
    """Whether a block can lie within the windows of all queries of a tile, away from the borders.

    Otherwise the branch for unmasked blocks is not compiled. From one query to the next, windows
    move by at most one stride per axis. On a causal axis, where a window ends at its query, they
    move by one position.
    """
    return _may_fill(keywords, keywords["TILE"], keywords["BLOCK"])


def may_fill_keys(keywords: dict[str, Any]) -> bool:
    """Like :func:`may_fill_queries`, for tiles of keys and blocks of queries."""
    return _may_fill(keywords, keywords["BLOCK"], keywords["TILE"])


def _may_fill(keywords: dict[str, Any], queries: Triple, keys: Triple) -> bool:
    axes = zip(
        keywords["KERNEL"], keywords["STRIDE"], keywords["CAUSAL"], queries, keys, strict=True
    )
    return all(
        kernel - (near - 1 if causal else (near - 1) // stride * stride) >= far
        for kernel, stride, causal, near, far in axes
    )


def configs(rank: int) -> list[triton.Config]:
    """The tiles, blocks, warps and stages that autotuning tries, safest first."""
    shapes: list[tuple[Triple, Triple, int, int]]
    if rank == 1:
        shapes = [
            ((1, 1, 64), (1, 1, 64), 4, 2),
            ((1, 1, 64), (1, 1, 32), 4, 3),
            ((1, 1, 64), (1, 1, 64), 8, 1),
            ((1, 1, 128), (1, 1, 64), 8, 2),
            ((1, 1, 128), (1, 1, 32), 4, 3),
            ((1, 1, 32), (1, 1, 32), 4, 2),
            ((1, 1, 32), (1, 1, 32), 8, 1),
            ((1, 1, 16), (1, 1, 16), 4, 1),
        ]
    elif rank == 2:
        shapes = [
            ((1, 8, 8), (1, 8, 8), 4, 2),
            ((1, 8, 8), (1, 8, 8), 4, 3),
            ((1, 8, 8), (1, 8, 8), 8, 1),
            ((1, 8, 8), (1, 4, 8), 4, 3),
            ((1, 8, 16), (1, 8, 8), 8, 2),
            ((1, 8, 16), (1, 4, 8), 4, 3),
            ((1, 4, 8), (1, 4, 8), 2, 3),
            ((1, 4, 8), (1, 4, 8), 4, 2),
            ((1, 4, 8), (1, 4, 8), 8, 1),
            ((1, 4, 4), (1, 4, 4), 4, 1),
        ]
    else:
        shapes = [
            ((4, 4, 4), (4, 4, 4), 4, 2),
            ((4, 4, 4), (4, 4, 4), 8, 1),
            ((2, 4, 8), (2, 4, 8), 4, 2),
            ((2, 8, 8), (2, 4, 8), 8, 2),
            ((4, 4, 8), (4, 4, 4), 8, 2),
            ((2, 4, 4), (2, 4, 4), 4, 2),
            ((2, 4, 4), (2, 4, 4), 8, 1),
            ((2, 2, 4), (2, 2, 4), 4, 1),
        ]
    return [
        triton.Config({"TILE": tile, "BLOCK": block}, num_warps=warps, num_stages=stages)
        for tile, block, warps, stages in shapes
    ]


def fitting(rank: int, arguments: dict[str, Any]) -> list[triton.Config]:
    """The configurations that fit in shared memory; those that also fit in registers come first.

    Both criteria are estimates, confirmed by ``tests/triton_report.py``. If none fits, the smallest
    is returned.
    """
    item_size = arguments["q_ref"][0].element_size()
    dims = arguments["PADDED_DIM"] + arguments.get("PADDED_VALUE_DIM", 0)
    candidates = configs(rank)
    chosen: list[tuple[bool, triton.Config]] = []
    for config in candidates:
        rows, columns = math.prod(config.kwargs["TILE"]), math.prod(config.kwargs["BLOCK"])
        items = (rows + config.num_stages * columns) * dims
        # A score of the split form has the pointer of its weight, of two registers.
        held = (rows + columns) * dims + rows * columns * (3 if "w_ref" in arguments else 1)
        if item_size == 4:
            # Operands are split for three TF32 products; more than four warps repeat this work.
            items += 3 * rows * columns
            crowded = held > 72 * 32 * min(config.num_warps, 4)
        else:
            items += 2 * rows * columns
            crowded = held > 168 * 32 * config.num_warps
        if items * item_size <= _SHARED_BYTES:
            chosen.append((crowded, config))
    chosen.sort(key=lambda crowded_config: crowded_config[0])
    return [config for _, config in chosen] or [candidates[-1]]
