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


def _all(names: str, *shape: int, **others: Any) -> dict[str, Any]:
    """Tensors of one shape, and other arguments."""
    return {**{name: _map(*shape) for name in names.split()}, **others}


_QKV = "query key value"
_HEADS = (1, 4, 4, 2, 4)  # (B, H, W, heads, head_dim)
_AROUND = {"kernel_size": 3, "stride": 1, "dilation": 1, "is_causal": False, "scale": 0.5}
_AROUND |= dict.fromkeys(("additional_keys", "additional_values", "rpb", "backend"))
_AROUND |= {"return_lse": False}
_TILED = {"network": lambda x: x, "x": _map(1, 1, 8, 8), "tile_size": 4, "overlap": 2}
_TILED |= {"scale": 1, "blend": 1}
_INDEX = {"window_size": 4, "device": None}
_BIASED = {**_all("q k v", 2, 2, 4, 3), "bias": _map(2, 4, 4)}
_ROUTED = _all("query key", 1, 4, 4, 8, region_size=(2, 2), topk=2)

# Arguments that a call takes, by module and name, of all functions of the pages (see below).
_ATTENTION: dict[str, dict[str, Any]] = {
    "biased.attend_in_turn": {**_BIASED, "masks": [None, None]},
    "biased.worth_a_turn": _BIASED,
    "bilevel.bilevel_routing_attention": {
        **{**_ROUTED, "value": _map(1, 4, 4, 8), "num_heads": 2, "scale": 0.5}
    },
    "bilevel.nearest_regions": _all("query_mean key_mean", 1, 4, 8, topk=2),
    "bilevel.route_regions": _ROUTED,
    "cascaded.cascaded_group_attention": {
        **{"x": _map(1, 8, 2, 2), "projections": [lambda x: (x, x, x)] * 2},
        "bias": _map(2, 4, 4),
    },
    "cascaded.distance_bias": {"table": _map(2, 3, 3)},
    "cascaded.resize_distance_table": {"table": _map(2, 3, 3), "height": 4, "width": 4},
    "deformable.deformable_attention": {
        **{"value": _map(1, 5, 2, 4), "sizes": [(2, 2), (1, 1)]},
        **{"locations": _map(1, 3, 2, 2, 1, 2), "weights": _map(1, 3, 2, 2, 1)},
    },
    "deformable.pixel_centres": {
        **{"sizes": [(2, 2), (1, 1)], "device": None, "dtype": torch.float32}
    },
    "factorized.cross_window_fusion": _all("x", 1, 8, 8, 4, num_heads=2, window_size=3, dilation=2),
    "factorized.tap_positions": {
        **{"size": 8, "window_size": 3, "dilation": 2, "device": torch.device("cpu")}
    },
    "hilo.high_frequency_attention": _all("qkv", 1, 4, 4, 24, num_heads=2, window_size=2),
    "hilo.low_frequency_attention": {
        **{"query": _map(1, 4, 4, 8), "key_value": _map(1, 2, 2, 16), "num_heads": 2}
    },
    "pooled.pool_tokens": _all("x", 1, 6, 4, length=2),
    "rank_augmented.rank_augmented_linear_attention": _all(
        _QKV, 1, 2, 6, 4, rotary=(_map(6, 4), _map(6, 4)), scale=0.5, eps=1e-6
    ),
    "rank_augmented.rotary_table": {
        **{"height": 2, "width": 3, "head_dim": 4, "device": None, "dtype": torch.float32}
    },
    "single_head.single_head_attention": _all("query key", 1, 4, 2, 2, value=_map(1, 6, 2, 2)),
    "token_pooling.pool_tokens_before": {"attention": nn.Identity(), "dim": 8, "scales": 2},
    "token_pooling.token_attentions": {"model": nn.Identity()},
    "window.overlap_position_index": {**_INDEX, "overlap_size": 6},
    "window.overlapping_windows": _all("x", 1, 8, 8, 2, window_size=4, overlap_size=6),
    "window.relative_position_index": _INDEX,
    "window.shift_masks": {**_INDEX, "shift_size": 2, "dtype": torch.float32},
    "window.window_attention": _all(
        _QKV, 1, 2, 2, 4, 2, 4, bias=_map(2, 4, 4), masks=_map(3, 4, 4)
    ),
    "window.window_merge": _all("windows", 1, 2, 2, 4, 3, window_size=2),
    "window.window_partition": _all("x", 1, 4, 4, 3, window_size=2),
}
_OTHERS: dict[str, dict[str, Any]] = {
    "batch_norm.has_wrong_gradients": {},
    "batch_norm.with_canonical_strides": {"x": _map(1, 2, 3, 3)},
    "frames.frames_to_image": _all("video", 1, 3, 4, 2, 2, layout="tiles"),
    **{
        f"init.init_{n}": {"module": nn.Linear(2, 2)} for n in ("fan_out", "linear", "trunc_normal")
    },
    "init.trunc_normal": {"tensor": _map(2, 2), "std": 0.02},
    "kan.reflectional_switch": {"x": _map(2, 3), "grid": _map(4), "width": 0.3},
    "large_kernel.merge_dilated_kernels": {
        **{"weights": [_map(2, 1, 3, 3)], "dilations": [2], "kernel_size": 5}
    },
    "mobile.conv_stem": {"in_chans": 3, "dim": 16},
    "mobile.residual_merging": {"dim": 4, "out_dim": 8},
    "neighborhood.na1d": {**_all(_QKV, 1, 4, 2, 4), **_AROUND},
    "neighborhood.na2d": {**_all(_QKV, *_HEADS), **_AROUND},
    "neighborhood.na3d": {**_all(_QKV, 1, 3, 4, 4, 2, 4), **_AROUND},
    "padding.reflect_pad_to_multiple": _all("x", 1, 2, 5, 5, multiple=4),
    "padding.reflected_positions": {"positions": torch.arange(6), "size": 4},
    "position.resize_position_table": _all("table", 1, 4, 2, size=(3, 2)),
    "reparam.fold_norm_after": {"layer": nn.Conv2d(2, 2, 1), "norm": nn.BatchNorm2d(2)},
    "reparam.fold_norm_before": {"norm": nn.BatchNorm2d(2), "layer": nn.Conv2d(2, 2, 1)},
    "reparam.fold_scale_after": {"layer": nn.Linear(2, 2), "scale": _map(2), "shift": _map(2)},
    "reparam.fuse_children": {"module": nn.Sequential()},
    "reparam.norm_affine": {"norm": nn.BatchNorm2d(2)},
    "rounding.round_filters": {"model": nn.Conv2d(2, 2, 3), "dtype": torch.bfloat16},
    "rounding.round_keeping_sums": {"taps": _map(2, 9), "dtype": torch.bfloat16},
    "tiling.run_tiled": _TILED,
    "tiling.tile_spans": {"size": 8, "tile_size": 4, "overlap": 2},
    "tiling.tiled_strips": _TILED,
}
GOOD = {f"ops.attention.{name}": given for name, given in _ATTENTION.items()}
GOOD |= {f"ops.{name}": given for name, given in _OTHERS.items()}

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
