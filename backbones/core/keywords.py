"""Checks of constructor arguments, in one table for the keywords of all families."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ParamSpec, TypeVar

import numpy as np

from backbones.common.checks import (
    Check,
    either,
    flag,
    number,
    one_of,
    one_or_several,
    optional,
    several,
    text,
    whole,
)

__all__ = ["KERNEL", "KEYWORDS", "POOLINGS", "check", "checked"]

P = ParamSpec("P")
T = TypeVar("T")

_MOST_CHANNELS = 1 << 16
_MOST_CLASSES = 10**8
_LARGEST_WINDOW = 1024

POOLINGS = (
    *("", "avg", "max", "avgmax", "catavgmax"),
    *("fast", "fastavg", "fastmax", "fastavgmax", "fastcatavgmax"),
)


def widths(least: int) -> Check:
    """Channels of each stage, where the stem has a fraction of the first stage's."""
    return several(whole(least, _MOST_CHANNELS))


_channels = whole(1, _MOST_CHANNELS)
_some_channels = whole(0, _MOST_CHANNELS)
_count = whole(1, 1024)
_window = whole(1, _LARGEST_WINDOW)
KERNEL = whole(1, _LARGEST_WINDOW, odd=True)
_share = number(0, 1)
_ratio = number(0, 1024, open_below=True)
_scale = number(-1e6, 1e6)
_stages = whole(0, 63)

KEYWORDS: Mapping[str, Check] = {
    "act": flag,
    "alpha": _share,
    "attn_dims": several(_some_channels),
    "aux_head": flag,
    "attn_kernel_sizes": several(KERNEL),
    "band_kernel_size": KERNEL,
    "bottleneck": flag,
    "branch_ratio": _share,
    "compress_ratio": _channels,
    "depths": several(_count),
    "dilation": one_or_several(_window),
    "dilations": either(text, str, second=one_or_several(one_or_several(_window))),
    "dim": _channels,
    "dims": several(_channels),
    "distilled": flag,
    "drop_path_rate": _share,
    "drop_rate": _share,
    "expansions": several(several(whole(0, 64))),
    "focus_depths": several(_count, count=2),
    "gated": flag,
    "global_pool": one_of(*POOLINGS),
    "head_dim": _channels,
    "head_hidden_dim": _channels,
    "head_init_scale": _scale,
    "head_width": _channels,
    "img_range": number(0, 1e6, open_below=True),
    "img_size": whole(1, 1 << 20),
    "in_chans": _channels,
    "kernel_size": KERNEL,
    "kernel_sizes": several(KERNEL),
    "key_norm": flag,
    "layer_scale": _scale,
    "layer_scales": several(_scale),
    "linear": several(flag),
    "map_size": _window,
    "mean_of_directions": flag,
    "mix_ratio": _share,
    "mlp_ratio": _ratio,
    "mlp_ratios": several(_ratio),
    "n_win": _window,
    "nchw": flag,
    "norm_eps": number(0, 1, open_below=True),
    "num_classes": whole(0, _MOST_CLASSES),
    "num_heads": several(_channels),
    "num_states": whole(1, 256),
    "out_indices": one_or_several(whole(-64, 64)),
    "out_norms": either(flag, bool, np.bool_, second=several(_stages, may_be_empty=True)),
    "overlap_ratio": _share,
    "overview_feature": flag,
    "post_norm": flag,
    "proj_drop_rate": _share,
    "pyramid": flag,
    "qk_dim": _channels,
    "residual": flag,
    "scan_ratio": _ratio,
    "segments": whole(0, 1 << 20),
    "squeeze_factor": _channels,
    "sr_ratios": several(_window),
    "stem_dim": _channels,
    "stem_dims": several(_channels, count=3),
    "stem_features": flag,
    "swin_layout": flag,
    "token_pooling": whole(0, 64),
    "topks": several(optional(_count)),
    "upscale": one_of(1, 2, 3, 4),
    "vanilla": flag,
    "window_size": _window,
    "window_sizes": several(_window),
}


def check(name: str, value: Any) -> Any:
    """Check an argument's value by its entry in :data:`KEYWORDS`, and return it.

    Raises:
        TypeError, ValueError: the value is not allowed.
    """
    return KEYWORDS[name](name, value)


def checked(*each_stage: str, **own: Check) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Decorates a constructor: checks its arguments by :data:`KEYWORDS` before it runs.

    Args:
        each_stage: arguments that must have as many values as ``depths``.
        own: checks for this constructor, which take precedence over the table.
    """
    checks = {**KEYWORDS, **own}

    def decorate(constructor: Callable[P, T]) -> Callable[P, T]:
        signature = inspect.signature(constructor)

        @functools.wraps(constructor)
        def construct(*args: P.args, **kwargs: P.kwargs) -> T:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            values = bound.arguments
            for name in values.keys() & checks.keys():
                values[name] = checks[name](name, values[name])
            _check_stages(values, each_stage)
            _check_widths(values)
            return constructor(*bound.args, **bound.kwargs)

        return construct

    return decorate


def _check_stages(values: Mapping[str, Any], each_stage: Sequence[str]) -> None:
    for name in each_stage:
        if len(values[name]) != len(values["depths"]):
            raise ValueError(
                f"{name} must have a value for each of the {len(values['depths'])} stages of "
                f"depths {values['depths']}, got {values[name]}"
            )


def _check_widths(values: Mapping[str, Any]) -> None:
    dims = values.get("dims") or (values.get("dim"),)
    for name in values.keys() & {"mlp_ratio", "mlp_ratios", "scan_ratio"}:
        ratios = values[name] if name == "mlp_ratios" else (values[name],) * len(dims)
        for dim, ratio in zip(dims, ratios, strict=True):
            if int(dim * ratio) < 1:
                raise ValueError(f"{name} {values[name]} gives less than one channel for {dim}")
