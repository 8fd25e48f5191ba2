"""Checks of constructor arguments: those that most families have, and ranges for a family's own."""

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
    several,
    whole,
)

P = ParamSpec("P")
T = TypeVar("T")

_MOST_CHANNELS = 1 << 16

BLOCKS = whole(1, 1024)
CHANNELS = whole(1, _MOST_CHANNELS)
FEATURES = one_or_several(whole(-64, 64))  # indices of feature maps, or how many of the last
KERNEL = whole(1, 1024, odd=True)
RATIO = number(0, 1024, open_below=True)
SCALE = number(-1e6, 1e6)
SHARE = number(0, 1)
WINDOW = whole(1, 1024)

POOLINGS = (
    *("", "avg", "max", "avgmax", "catavgmax"),
    *("fast", "fastavg", "fastmax", "fastavgmax", "fastcatavgmax"),
)


def widths(least: int) -> Check:
    """Channels of each stage, where the stem has a fraction of the first stage's."""
    return several(whole(least, _MOST_CHANNELS))


# Of every constructor that has the keyword, unless it declares a check of its own.
KEYWORDS: Mapping[str, Check] = {
    "depths": several(BLOCKS),
    "dim": CHANNELS,
    "dims": several(CHANNELS),
    "drop_path_rate": SHARE,
    "drop_rate": SHARE,
    "global_pool": one_of(*POOLINGS),
    "in_chans": CHANNELS,
    "kernel_size": KERNEL,
    "layer_scale": SCALE,
    "mlp_ratio": RATIO,
    "mlp_ratios": several(RATIO),
    "num_classes": whole(0, 10**8),
    "num_heads": several(CHANNELS),
    "out_norms": either(flag, bool, np.bool_, second=several(whole(0, 63), may_be_empty=True)),
    "proj_drop_rate": SHARE,
    "pyramid": flag,
    "stem_dim": CHANNELS,
    "stem_features": flag,
    "window_size": WINDOW,
}


def checked(*each_stage: str, **own: Check) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Decorates a constructor: checks its arguments before it runs.

    Args:
        each_stage: arguments that must have as many values as ``depths``.
        own: checks of the constructor's own keywords, and of those that it has in another form
            than :data:`KEYWORDS` says.
    """

    def decorate(constructor: Callable[P, T]) -> Callable[P, T]:
        signature = inspect.signature(constructor)
        names = [name for name in signature.parameters if name != "self"]
        checks = {**KEYWORDS, **own}
        if unmatched := (set(names) - checks.keys()) | (own.keys() - set(names)):
            raise TypeError(
                f"{constructor.__qualname__} has no check, or no parameter, {sorted(unmatched)}"
            )

        @functools.wraps(constructor)
        def construct(*args: P.args, **kwargs: P.kwargs) -> T:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            values = bound.arguments
            for name in names:
                values[name] = checks[name](name, values[name])
            _check_stages(values, each_stage)
            for name in values.keys() & {"mlp_ratio", "mlp_ratios"}:
                dims = values["dims"] if "dims" in values else (values["dim"],)
                check_widths(name, dims, values[name])
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


def check_widths(name: str, dims: Sequence[int], ratios: float | Sequence[float]) -> None:
    """Raise a ValueError if a ratio, for all stages or one, leaves no channel."""
    each = ratios if isinstance(ratios, Sequence) else (ratios,) * len(dims)
    for dim, ratio in zip(dims, each, strict=True):
        if int(dim * ratio) < 1:
            raise ValueError(f"{name} {ratios} gives less than one channel for {dim}")
