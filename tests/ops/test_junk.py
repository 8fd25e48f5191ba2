"""Invalid values for any argument of any op raise a TypeError or ValueError that names it."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from junk import complaints
from torch import nn

PAGES = Path(__file__).parents[2] / "docs" / "reference"


def _map(*shape: int) -> torch.Tensor:
    return torch.ones(shape)


_HEADS = _map(1, 4, 4, 2, 4)  # (B, H, W, heads, head_dim)
_WINDOWS = _map(1, 2, 2, 4, 2, 4)  # (B, rows, columns, tokens, heads, head_dim)
_TILES = {"network": lambda x: x, "x": _map(1, 1, 8, 8), "tile_size": 4, "overlap": 2}
_AROUND = {"kernel_size": 3, "stride": 1, "dilation": 1, "is_causal": False, "scale": 0.5}
_AROUND |= {"additional_keys": None, "additional_values": None, "rpb": None}
_AROUND |= {"return_lse": False, "backend": None}

# Arguments that a call takes, by module and name, of all functions of the pages (see below).
GOOD: dict[str, dict[str, Any]] = {
    "ops.attention.biased.attend_in_turn": {
        **{"q": _map(2, 2, 4, 3), "k": _map(2, 2, 4, 3), "v": _map(2, 2, 4, 3)},
        **{"bias": _map(2, 4, 4), "masks": [None, None]},
    },
    "ops.attention.biased.worth_a_turn": {
        **{"q": _map(2, 2, 4, 3), "k": _map(2, 2, 4, 3), "v": _map(2, 2, 4, 3)},
        "bias": _map(2, 4, 4),
    },
    "ops.attention.bilevel.bilevel_routing_attention": {
        **{"query": _map(1, 4, 4, 8), "key": _map(1, 4, 4, 8), "value": _map(1, 4, 4, 8)},
        **{"num_heads": 2, "region_size": (2, 2), "topk": 2, "scale": 0.5},
    },
    "ops.attention.bilevel.nearest_regions": {
        **{"query_mean": _map(1, 4, 8), "key_mean": _map(1, 4, 8), "topk": 2}
    },
    "ops.attention.bilevel.route_regions": {
        **{"query": _map(1, 4, 4, 8), "key": _map(1, 4, 4, 8), "region_size": (2, 2), "topk": 2}
    },
    "ops.attention.cascaded.cascaded_group_attention": {
        **{"x": _map(1, 8, 2, 2), "projections": [lambda x: (x, x, x)] * 2},
        "bias": _map(2, 4, 4),
    },
    "ops.attention.cascaded.distance_bias": {"table": _map(2, 3, 3)},
    "ops.attention.cascaded.resize_distance_table": {
        **{"table": _map(2, 3, 3), "height": 4, "width": 4}
    },
    "ops.attention.deformable.deformable_attention": {
        **{"value": _map(1, 5, 2, 4), "sizes": [(2, 2), (1, 1)]},
        **{"locations": _map(1, 3, 2, 2, 1, 2), "weights": _map(1, 3, 2, 2, 1)},
    },
    "ops.attention.deformable.pixel_centres": {
        **{"sizes": [(2, 2), (1, 1)], "device": None, "dtype": torch.float32}
    },
    "ops.attention.factorized.cross_window_fusion": {
        **{"x": _map(1, 8, 8, 4), "num_heads": 2, "window_size": 3, "dilation": 2}
    },
    "ops.attention.factorized.tap_positions": {
        **{"size": 8, "window_size": 3, "dilation": 2, "device": torch.device("cpu")}
    },
    "ops.attention.hilo.high_frequency_attention": {
        **{"qkv": _map(1, 4, 4, 24), "num_heads": 2, "window_size": 2}
    },
    "ops.attention.hilo.low_frequency_attention": {
        **{"query": _map(1, 4, 4, 8), "key_value": _map(1, 2, 2, 16), "num_heads": 2}
    },
    "ops.attention.pooled.pool_tokens": {"x": _map(1, 6, 4), "length": 2},
    "ops.attention.rank_augmented.rank_augmented_linear_attention": {
        **{"query": _map(1, 2, 6, 4), "key": _map(1, 2, 6, 4), "value": _map(1, 2, 6, 4)},
        **{"rotary": (_map(6, 4), _map(6, 4)), "scale": 0.5, "eps": 1e-6},
    },
    "ops.attention.rank_augmented.rotary_table": {
        **{"height": 2, "width": 3, "head_dim": 4, "device": None, "dtype": torch.float32}
    },
    "ops.attention.single_head.single_head_attention": {
        **{"query": _map(1, 4, 2, 2), "key": _map(1, 4, 2, 2), "value": _map(1, 6, 2, 2)}
    },
    "ops.attention.token_pooling.pool_tokens_before": {
        **{"attention": nn.Identity(), "dim": 8, "scales": 2}
    },
    "ops.attention.token_pooling.token_attentions": {"model": nn.Identity()},
    "ops.attention.window.overlap_position_index": {
        **{"window_size": 4, "overlap_size": 6, "device": None}
    },
    "ops.attention.window.overlapping_windows": {
        **{"x": _map(1, 8, 8, 2), "window_size": 4, "overlap_size": 6}
    },
    "ops.attention.window.relative_position_index": {"window_size": 4, "device": None},
    "ops.attention.window.shift_masks": {
        **{"window_size": 4, "shift_size": 2, "dtype": torch.float32, "device": None}
    },
    "ops.attention.window.window_attention": {
        **{"query": _WINDOWS, "key": _WINDOWS, "value": _WINDOWS},
        **{"bias": _map(2, 4, 4), "masks": _map(3, 4, 4)},
    },
    "ops.attention.window.window_merge": {"windows": _map(1, 2, 2, 4, 3), "window_size": 2},
    "ops.attention.window.window_partition": {"x": _map(1, 4, 4, 3), "window_size": 2},
    "ops.batch_norm.has_wrong_gradients": {},
    "ops.batch_norm.with_canonical_strides": {"x": _map(1, 2, 3, 3)},
    "ops.frames.frames_to_image": {"video": _map(1, 3, 4, 2, 2), "layout": "tiles"},
    "ops.init.init_fan_out": {"module": nn.Linear(2, 2)},
    "ops.init.init_linear": {"module": nn.Linear(2, 2)},
    "ops.init.init_trunc_normal": {"module": nn.Linear(2, 2)},
    "ops.init.trunc_normal": {"tensor": _map(2, 2), "std": 0.02},
    "ops.kan.reflectional_switch": {"x": _map(2, 3), "grid": _map(4), "width": 0.3},
    "ops.large_kernel.merge_dilated_kernels": {
        **{"weights": [_map(2, 1, 3, 3)], "dilations": [2], "kernel_size": 5}
    },
    "ops.mobile.conv_stem": {"in_chans": 3, "dim": 16},
    "ops.mobile.residual_merging": {"dim": 4, "out_dim": 8},
    "ops.neighborhood.na1d": {
        **{"query": _map(1, 4, 2, 4), "key": _map(1, 4, 2, 4), "value": _map(1, 4, 2, 4)},
        **_AROUND,
    },
    "ops.neighborhood.na2d": {"query": _HEADS, "key": _HEADS, "value": _HEADS, **_AROUND},
    "ops.neighborhood.na3d": {
        **{name: _map(1, 3, 4, 4, 2, 4) for name in ("query", "key", "value")},
        **_AROUND,
    },
    "ops.padding.reflect_pad_to_multiple": {"x": _map(1, 2, 5, 5), "multiple": 4},
    "ops.padding.reflected_positions": {"positions": torch.arange(6), "size": 4},
    "ops.position.resize_position_table": {"table": _map(1, 4, 2), "size": (3, 2)},
    "ops.reparam.fold_norm_after": {"layer": nn.Conv2d(2, 2, 1), "norm": nn.BatchNorm2d(2)},
    "ops.reparam.fold_norm_before": {"norm": nn.BatchNorm2d(2), "layer": nn.Conv2d(2, 2, 1)},
    "ops.reparam.fold_scale_after": {
        **{"layer": nn.Linear(2, 2), "scale": _map(2), "shift": _map(2)}
    },
    "ops.reparam.fuse_children": {"module": nn.Sequential()},
    "ops.reparam.norm_affine": {"norm": nn.BatchNorm2d(2)},
    "ops.rounding.round_filters": {"model": nn.Conv2d(2, 2, 3), "dtype": torch.bfloat16},
    "ops.rounding.round_keeping_sums": {"taps": _map(2, 9), "dtype": torch.bfloat16},
    "ops.tiling.run_tiled": {**_TILES, "scale": 1, "blend": 1},
    "ops.tiling.tile_spans": {"size": 8, "tile_size": 4, "overlap": 2},
    "ops.tiling.tiled_strips": {**_TILES, "scale": 1, "blend": 1},
}

for _rank in (1, 2, 3):  # heads first
    _sides = (1, 2, *[4] * _rank)
    _ROW = {"kernel_size": 3, "dilation": 1}
    _QK = {"query": _map(*_sides, 4), "key": _map(*_sides, 4)}
    _AV = {"attn": _map(*_sides, 3**_rank), "value": _map(*_sides, 4)}
    GOOD[f"ops.neighborhood.na{_rank}d_qk"] = {
        **{**_QK, **_ROW, "additional_keys": None, "is_causal": False, "rpb": None}
    }
    GOOD[f"ops.neighborhood.na{_rank}d_av"] = {
        **{**_AV, **_ROW, "additional_values": None, "is_causal": False}
    }
    if _rank < 3:
        GOOD[f"ops.neighborhood.natten{_rank}dqk"] = {**_QK, **_ROW}
        GOOD[f"ops.neighborhood.natten{_rank}dav"] = {**_AV, **_ROW}
        GOOD[f"ops.neighborhood.natten{_rank}dqkrpb"] = {**_QK, "rpb": None, **_ROW}


def _function(path: str) -> Callable[..., Any]:
    module, _, name = path.rpartition(".")
    function = getattr(importlib.import_module(module), name)
    if inspect.isgeneratorfunction(function):
        return lambda **arguments: list(function(**arguments))
    return function


def test_every_function_of_the_pages_is_here() -> None:
    pages = [PAGES / f"{name}.md" for name in ("attention", "ops")]
    modules = {m for page in pages for m in re.findall(r"^::: (\S+)$", page.read_text(), re.M)}
    modules.add("ops.neighborhood")
    functions = {
        f"{module}.{name}"
        for module in modules
        for name in importlib.import_module(module).__all__
        if inspect.isfunction(function := getattr(importlib.import_module(module), name))
        and inspect.signature(function).parameters
    }
    assert GOOD.keys() >= functions


@pytest.mark.parametrize("path", GOOD)
def test_a_function(path: str) -> None:
    found = complaints(_function(path), GOOD[path])
    assert not found, "\n".join(found)
