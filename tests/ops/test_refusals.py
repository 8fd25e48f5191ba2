"""What an op or a layer cannot take is refused with the value and what would be right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ops.attention.bilevel import BiLevelRoutingAttention, bilevel_routing_attention
from ops.attention.cascaded import CascadedGroupAttention, cascaded_group_attention
from ops.attention.channel import EfficientChannelAttention
from ops.attention.deformable import DeformableAttention, deformable_attention
from ops.attention.factorized import FactorizedAttention, cross_window_fusion
from ops.attention.hilo import HiLoAttention, high_frequency_attention
from ops.attention.pooled import PooledAttention, pool_tokens
from ops.attention.rank_augmented import (
    RankAugmentedAttention,
    rank_augmented_linear_attention,
    rotary_table,
)
from ops.attention.single_head import SingleHeadAttention
from ops.attention.window import OverlappingWindowAttention, WindowAttention
from ops.conv import InceptionDWConv2d
from ops.frames import frames_to_image
from ops.kan import KAN, KANLayer
from ops.large_kernel import DilatedReparamConv2d
from ops.position import ConvPosition, resize_position_table
from ops.pyramid import SimplePyramid
from ops.reparam import fold_norm_before, norm_affine
from ops.tiling import run_tiled

_0 = torch.zeros
MAP, WIDE, HEADS = _0(2, 4, 4, 8), _0(2, 4, 4, 12), _0(1, 2, 6, 8)
SIZES = ((3, 5), (2, 2), (1, 4))


def _bilevel(
    query: Tensor = MAP, key: Tensor = MAP, value: Tensor = WIDE, *more: Any, heads: int = 2
) -> Tensor:
    return bilevel_routing_attention(query, key, value, heads, *(more or ((2, 2), 1)))


def _deformable(sizes: Any = SIZES, heads: int = 2, points: int = 2) -> Tensor:
    locations, weights = _0(2, 3, heads, 3, 2, 2), _0(2, 3, heads, 3, points)
    return deformable_attention(_0(2, 23, 2, 3), sizes, locations, weights)


def _tiled(x: Tensor | None = None, **options: int) -> Tensor:
    def twice(x: Tensor) -> Tensor:
        return x.repeat_interleave(2, 2).repeat_interleave(2, 3)

    x = _0(1, 1, 8, 8) if x is None else x
    return run_tiled(twice, x, **{"tile_size": 4, "overlap": 2, "scale": 2, **options})


CASES: list[tuple[Callable[[], object], str]] = [
    # Convolutions.
    (lambda: InceptionDWConv2d(16, band_kernel_size=10), "must be odd.*10"),
    (lambda: InceptionDWConv2d(16, branch_ratio=0.01), "branch_ratio 0.01"),
    (lambda: InceptionDWConv2d(16, branch_ratio=0.4), "branch_ratio 0.4"),
    (lambda: DilatedReparamConv2d(4, 12), "no branches are published"),
    (lambda: DilatedReparamConv2d(4, 3), "no branches are published"),
    (lambda: DilatedReparamConv2d(4, 7, [(5, 2)]), "span 9 at most 7"),
    (lambda: DilatedReparamConv2d(4, 7, [(4, 1)]), "odd"),
    (lambda: DilatedReparamConv2d(4, 8, [(3, 1)]), "odd"),
    (lambda: DilatedReparamConv2d(4, 7, [(3, 0)]), "dilation 0"),
    (lambda: ConvPosition(4, 2), "odd, got 2"),
    *((lambda n=n: SimplePyramid(n), f"multiple of 4, got {n}") for n in (0, 2, 30)),
    # Folding.
    (lambda: norm_affine(nn.BatchNorm2d(3, track_running_stats=False)), "running statistics"),
    *(
        (lambda c=c: fold_norm_before(nn.BatchNorm2d(6), c), "with padding or groups")
        for c in (nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 1, groups=6))
    ),
    # Frames, tables and tiles.
    (lambda: frames_to_image(_0(1, 3, 15, 8, 8)), "a square, such as 16, got 15"),
    (lambda: frames_to_image(_0(1, 3, 0, 8, 8)), "a square, such as 16, got 0"),
    (lambda: frames_to_image(_0(1, 3, 8, 8)), r"\(B, C, T, H, W\), got \(1, 3, 8, 8\)"),
    (lambda: frames_to_image(_0(1, 3, 16, 8, 8), "grid"), "'rows' or 'tiles', got 'grid'"),
    (lambda: resize_position_table(_0(1, 15, 2), (4, 4)), "n² entries, got 15"),
    (lambda: _tiled(tile_size=0), "tile_size must be 1 or more, got 0"),
    (lambda: _tiled(overlap=3, blend=3), r"blend must be in 0 … 2 .* got 3"),
    (lambda: _tiled(scale=3), "scale 3 a tile should become 18×18, but .* made 12×12"),
    (lambda: _tiled(_0(1, 1, 0, 8)), "0×8 has no pixels"),
    # Kolmogorov-Arnold layers.
    (lambda: KANLayer(2, 2, num_grids=1), r"got 1, \(-2.0, 2.0\) and 0.33"),
    (lambda: KANLayer(2, 2, grid_range=(1, 1)), "ascending"),
    (lambda: KANLayer(2, 2, width=0), "and 0$"),
    (lambda: KAN((3,)), r"\(3,\)"),
    # Bi-level routing.
    (lambda: _bilevel(key=MAP[:, :2]), r"\(2, 2, 4, 8\)"),
    (lambda: _bilevel(value=WIDE[:1]), r"\(1, 4, 4, 12\)"),
    (lambda: _bilevel(MAP[0], MAP[0], WIDE[0]), r"query must be \(batch, height"),
    (lambda: _bilevel(heads=8), "num_heads.*got 8"),
    (lambda: _bilevel(heads=0), "num_heads.*got 0"),
    (lambda: _bilevel(MAP, MAP, WIDE, (0, 2), 1), r"\(0, 2\) and 1"),
    (lambda: _bilevel(MAP, MAP, WIDE, (2, 2), 0), "topk must be 1 or more, got 0"),
    (lambda: BiLevelRoutingAttention(16, num_heads=5), "num_heads.*got 5"),
    (lambda: BiLevelRoutingAttention(16, n_win=0), "n_win.*got 0"),
    (lambda: BiLevelRoutingAttention(16, topk=0), "and 0"),
    (lambda: BiLevelRoutingAttention(16, lepe_kernel_size=4), "odd, got 4"),
    # Cascaded groups.
    (lambda: CascadedGroupAttention(8, 3), "multiple of num_heads"),
    (lambda: CascadedGroupAttention(8, 2, window_size=0), "window_size"),
    (lambda: CascadedGroupAttention(8, 2, table_size=0), "table_size"),
    (lambda: CascadedGroupAttention(8, 2, kernel_sizes=(3,)), "kernel_sizes"),
    (lambda: CascadedGroupAttention(8, 2, kernel_sizes=(3, 4)), "odd"),
    (lambda: cascaded_group_attention(_0(1, 7, 2, 2), [nn.Identity()] * 2), "7 channels"),
    # Deformable.
    *(
        (lambda s=s: _deformable(s), "sizes must be the height and width")
        for s in ((), ((3, 5), (0, 2)), ((3, 5, 1),), ((-3, -5), (2, 4)))
    ),
    (lambda: _deformable(SIZES[:2]), r"value must be \(2, 19, .* got \(2, 23,"),
    (lambda: _deformable(points=1), r"weights must be .*, got .*3, 1\)"),
    (lambda: _deformable(heads=1), r"locations must be \(2, 3, 2, 3, 2, 2\)"),
    (lambda: DeformableAttention(8, 3), "got 3 heads for 8 channels"),
    (lambda: DeformableAttention(8, 4, value_ratio=0.25), r"4 heads for 2 channels \(dim 8"),
    (lambda: DeformableAttention(8, 2, points=0), "levels and points must be 1 or more, got 1 and"),
    (
        lambda: DeformableAttention(8, 2, 3, 2)(_0(1, 1, 8), _0(1, 2), _0(1, 4, 8), [(2, 2)]),
        "sizes must describe 3 maps, got 1",
    ),
    # Others.
    (lambda: EfficientChannelAttention(4), "kernel_size must be odd, got 4"),
    (lambda: cross_window_fusion(_0(1, 4, 4, 5), 2), "5 channels do not divide into 2 heads"),
    (lambda: FactorizedAttention(36, 1), "dim must be a multiple of 8.*got 36"),
    (lambda: FactorizedAttention(32, 3, 2, (1, 2)), "2 branches of 3 heads, got 32"),
    (lambda: HiLoAttention(16, 3), "num_heads must divide dim 16, got 3"),
    (lambda: HiLoAttention(16, 4, alpha=1.5), r"alpha must be in 0 … 1, got 1\.5"),
    (lambda: HiLoAttention(16, 4, window_size=0), "window_size must be 1 or more, got 0"),
    (lambda: high_frequency_attention(_0(1, 5, 4, 12), 1, 2), "5×4 can't be divided into windows"),
    (lambda: pool_tokens(_0(1, 4, 2), 0), "got 0"),
    (lambda: PooledAttention(8, 3), "got 3 heads for 8 channels"),
    (lambda: rank_augmented_linear_attention(HEADS, HEADS[:, :, :5], HEADS), r"\(1, 2, 5, 8\)"),
    (lambda: rank_augmented_linear_attention(HEADS[0], HEADS[0], HEADS[0]), r"\(2, 6, 8\)"),
    (
        lambda: rank_augmented_linear_attention(HEADS, HEADS, HEADS, rotary_table(2, 2, 8)),
        r"rotary\[0\] must be \(6, 8\), got \(4, 8\)",
    ),
    (lambda: rotary_table(2, 2, 6), "multiple of 4, got 6"),
    (lambda: RankAugmentedAttention(64, 3), "num_heads, got 3"),
    (lambda: SingleHeadAttention(10, 0), "got 0"),
    (lambda: SingleHeadAttention(10, 11), "got 11"),
    (lambda: WindowAttention(6, 4, 4), "num_heads must divide dim 6, got 4"),
    (lambda: WindowAttention(4, 4, 2, 4), r"shift_size must be in 0 … 3 \(below window_size\)"),
    (lambda: WindowAttention(4, 4, 2)(_0(1, 6, 8, 4)), "6×8 can't be divided into windows of 4"),
    (lambda: OverlappingWindowAttention(4, 4, 2, 0.25), r"overlap_ratio 0\.25 grows windows of 4"),
]


@pytest.mark.parametrize(("call", "message"), CASES)
def test_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_a_bool_is_no_number() -> None:
    with pytest.raises(TypeError, match="length must be a whole number, got True"):
        pool_tokens(_0(1, 4, 2), True)
