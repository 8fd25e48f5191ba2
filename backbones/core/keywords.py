"""Checks of constructor arguments, from their annotations and the ranges of their names."""

from __future__ import annotations

import functools
import inspect
import types
import typing
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
    whole,
)

P = ParamSpec("P")
T = TypeVar("T")

_MOST_CHANNELS = 1 << 16

BLOCKS = WINDOW = whole(1, 1024)
CHANNELS = whole(1, _MOST_CHANNELS)
FEATURES = one_or_several(whole(-64, 64))  # indices of feature maps, or how many of the last
KERNEL = whole(1, 1024, odd=True)
RATIO = number(0, 1024, open_below=True)
SCALE = number(-1e6, 1e6)
SHARE = number(0, 1)

POOLINGS = (
    *("", "avg", "max", "avgmax", "catavgmax"),
    *("fast", "fastavg", "fastmax", "fastavgmax", "fastcatavgmax"),
)


def widths(least: int) -> Check:
    """Channels of each stage, where the stem has a fraction of the first stage's."""
    return several(whole(least, _MOST_CHANNELS))


# Of each value of a type, and of a keyword's values in every constructor that has it.
TYPES: Mapping[type, Check] = {bool: flag, int: WINDOW, float: RATIO}
KEYWORDS: Mapping[str, Check] = {
    **dict.fromkeys(("dim", "dims", "stem_dim", "stem_dims", "qk_dim", "head_dim"), CHANNELS),
    **dict.fromkeys(("in_chans", "head_hidden_dim", "head_width"), CHANNELS),
    **dict.fromkeys(("kernel_size", "kernel_sizes"), KERNEL),
    **dict.fromkeys(("attn_kernel_sizes", "band_kernel_size"), KERNEL),
    **dict.fromkeys(("drop_path_rate", "drop_rate", "proj_drop_rate"), SHARE),
    **dict.fromkeys(("layer_scale", "layer_scales"), SCALE),
    "global_pool": one_of(*POOLINGS),
    "img_size": whole(1, 1 << 20),
    "norm_eps": number(0, 1, open_below=True),
    "num_classes": whole(0, 10**8),
}
_OUT_NORMS = either(flag, bool, np.bool_, second=several(whole(0, 63), may_be_empty=True))


def checked(*each_stage: str, **own: Check) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Decorates a constructor: checks its arguments before it runs.

    Args:
        each_stage: arguments that must have as many values as ``depths``.
        own: checks of whole arguments, where annotation and :data:`KEYWORDS` don't say enough.
    """

    def decorate(constructor: Callable[P, T]) -> Callable[P, T]:
        signature, hints = inspect.signature(constructor), typing.get_type_hints(constructor)
        whole_checks = {"out_norms": _OUT_NORMS, **own}
        checks = {
            name: whole_checks.get(name) or _check_of(hints[name], KEYWORDS.get(name))
            for name in signature.parameters
            if name != "self"
        }

        @functools.wraps(constructor)
        def construct(*args: P.args, **kwargs: P.kwargs) -> T:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            values = bound.arguments
            for name, check in checks.items():
                values[name] = check(name, values[name])
            _check_stages(values, each_stage)
            for name in values.keys() & {"mlp_ratio", "mlp_ratios"}:
                dims = values["dims"] if "dims" in values else (values["dim"],)
                check_widths(name, dims, values[name])
            return constructor(*bound.args, **bound.kwargs)

        return construct

    return decorate


def _check_of(hint: Any, each: Check | None) -> Check:
    """The check of an annotation: T, Sequence[T], T | Sequence[T] or T | None.

    ``each`` is that of its values, where it isn't their type's.
    """
    parts = typing.get_args(hint)
    if isinstance(hint, types.UnionType):
        first = _check_of(parts[0], each)
        return optional(first) if parts[1] is type(None) else one_or_several(first)
    return several(_check_of(parts[0], each)) if parts else each or TYPES[hint]


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
