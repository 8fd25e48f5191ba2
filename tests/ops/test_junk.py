"""Invalid values for any argument of any op raise a TypeError or ValueError that names it."""

from __future__ import annotations

import functools
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


# Arguments by their names, where a function has no other below.
COMMON: dict[str, Any] = {
    **{"num_heads": 2, "window_size": 2, "topk": 2, "region_size": (2, 2), "scale": 0.5},
    **{"height": 2, "width": 3, "head_dim": 4, "eps": 1e-6, "std": 0.02, "multiple": 4, "size": 8},
    **{"device": None, "dtype": torch.float32, "sizes": [(2, 2), (1, 1)], "dim": 8, "scales": 2},
    **{"kernel_size": 3, "stride": 1, "dilation": 1, "is_causal": False, "return_lse": False},
    **dict.fromkeys(("additional_keys", "additional_values", "rpb", "backend")),
    **{"tile_size": 4, "overlap": 2, "blend": 1, "network": lambda x: x},
    **{"module": nn.Linear(2, 2), "norm": nn.BatchNorm2d(2), "attention": nn.Identity()},
}
# The others, by module and name, of all functions of the pages; tensors are given by their shapes.
_SPECIAL: dict[str, dict[str, Any]] = {
    "attention.biased.attend_in_turn": {
        **{"q k v": (2, 2, 4, 3), "bias": (2, 4, 4)},
        "masks": [None, None],
    },
    "attention.biased.worth_a_turn": {"q k v": (2, 2, 4, 3), "bias": (2, 4, 4)},
    "attention.bilevel.bilevel_routing_attention": {"query key value": (1, 4, 4, 8)},
    "attention.bilevel.nearest_regions": {"query_mean key_mean": (1, 4, 8)},
    "attention.bilevel.route_regions": {"query key": (1, 4, 4, 8)},
    "attention.cascaded.cascaded_group_attention": {
        **{"x": (1, 8, 2, 2), "bias": (2, 4, 4)},
        "projections": [lambda x: (x, x, x)] * 2,
    },
    "attention.cascaded.distance_bias": {"table": (2, 3, 3)},
    "attention.cascaded.resize_distance_table": {"table": (2, 3, 3)},
    "attention.deformable.deformable_attention": {
        **{"value": (1, 5, 2, 4), "locations": (1, 3, 2, 2, 1, 2), "weights": (1, 3, 2, 2, 1)}
    },
    "attention.deformable.pixel_centres": {},
    "attention.factorized.cross_window_fusion": {"x": (1, 8, 8, 4)},
    "attention.factorized.tap_positions": {"device": torch.device("cpu")},
    "attention.hilo.high_frequency_attention": {"qkv": (1, 4, 4, 24)},
    "attention.hilo.low_frequency_attention": {"query": (1, 4, 4, 8), "key_value": (1, 2, 2, 16)},
    "attention.pooled.pool_tokens": {"x": (1, 6, 4), "length": 2},
    "attention.rank_augmented.rank_augmented_linear_attention": {
        **{"query key value": (1, 2, 6, 4), "rotary": [torch.ones(6, 4)] * 2}
    },
    "attention.rank_augmented.rotary_table": {},
    "attention.single_head.single_head_attention": {
        "query key": (1, 4, 2, 2),
        "value": (1, 6, 2, 2),
    },
    "attention.token_pooling.pool_tokens_before": {},
    "attention.token_pooling.token_attentions": {"model": nn.Identity()},
    "attention.window.overlap_position_index": {"overlap_size": 4},
    "attention.window.overlapping_windows": {"x": (1, 8, 8, 2), "overlap_size": 4},
    "attention.window.relative_position_index": {},
    "attention.window.shift_masks": {"shift_size": 1},
    "attention.window.window_attention": {
        **{"query key value": (1, 2, 2, 4, 2, 4), "bias": (2, 4, 4), "masks": (3, 4, 4)}
    },
    "attention.window.window_merge": {"windows": (1, 2, 2, 4, 3)},
    "attention.window.window_partition": {"x": (1, 4, 4, 3)},
    "batch_norm.has_wrong_gradients": {},
    "batch_norm.with_canonical_strides": {"x": (1, 2, 3, 3)},
    "frames.frames_to_image": {"video": (1, 3, 4, 2, 2), "layout": "tiles"},
    **dict.fromkeys(("init.init_fan_out", "init.init_linear", "init.init_trunc_normal"), {}),
    "init.trunc_normal": {"tensor": (2, 2)},
    "kan.reflectional_switch": {"x": (2, 3), "grid": (4,), "width": 0.3},
    "large_kernel.merge_dilated_kernels": {
        **{"weights": [torch.ones(2, 1, 3, 3)], "dilations": [2]},
        "kernel_size": 5,
    },
    "mobile.conv_stem": {"in_chans": 3, "dim": 16},
    "mobile.residual_merging": {"out_dim": 8},
    "padding.reflect_pad_to_multiple": {"x": (1, 2, 5, 5)},
    "padding.reflected_positions": {"positions": torch.arange(6)},
    "position.resize_position_table": {"table": (1, 4, 2), "size": [3, 2]},
    "reparam.fold_norm_after": {"layer": nn.Conv2d(2, 2, 1)},
    "reparam.fold_norm_before": {"layer": nn.Conv2d(2, 2, 1)},
    "reparam.fold_scale_after": {"layer": nn.Linear(2, 2), "scale shift": (2,)},
    "reparam.fuse_children": {"module": nn.Sequential()},
    "reparam.norm_affine": {},
    "rounding.round_filters": {"model": nn.Conv2d(2, 2, 3), "dtype": torch.bfloat16},
    "rounding.round_keeping_sums": {"taps": (2, 9), "dtype": torch.bfloat16},
    "tiling.run_tiled": {"x": (1, 1, 8, 8), "scale": 1},
    "tiling.tile_spans": {},
    "tiling.tiled_strips": {"x": (1, 1, 8, 8), "scale": 1},
}
for _rank in (1, 2, 3):
    _map, _of = (3, 4, 4)[-_rank:], f"neighborhood.na{_rank}d"
    _query = {"query key": (1, 2, *_map, 4)}  # heads first
    _attn = {"attn": (1, 2, *_map, 3**_rank), "value": (1, 2, *_map, 4)}
    _SPECIAL |= {
        _of: {"query key value": (1, *_map, 2, 4)},
        f"{_of}_qk": _query,
        f"{_of}_av": _attn,
    }
    if _rank < 3:
        for _name in ("qk", "qkrpb"):
            _SPECIAL[f"neighborhood.natten{_rank}d{_name}"] = _query
        _SPECIAL[f"neighborhood.natten{_rank}dav"] = _attn


def _function(path: str) -> Callable[..., Any]:
    module, _, name = path.rpartition(".")
    function = getattr(importlib.import_module(module), name)
    if not inspect.isgeneratorfunction(function):
        return function
    return functools.wraps(function)(lambda **arguments: list(function(**arguments)))


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
    assert {f"ops.{path}" for path in _SPECIAL} >= functions


@pytest.mark.parametrize("path", _SPECIAL)
def test_a_function(path: str) -> None:
    function, given = _function(f"ops.{path}"), {}
    for names, value in _SPECIAL[path].items():
        made = torch.ones(value) if isinstance(value, tuple) else value
        given |= dict.fromkeys(names.split(), made)
    for name in inspect.signature(function).parameters.keys() - given.keys():
        given[name] = COMMON[name]
    found = complaints(function, given)
    assert not found, "\n".join(found)
