"""Checks of arguments, in one table for the keywords of all families.

A check takes an argument's name and value, and returns the value as a built-in type. It raises a
TypeError for another kind of value, and a ValueError for one out of range.
"""

from __future__ import annotations

import functools
import inspect
import numbers
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ParamSpec, TypeVar

import numpy as np

from backbones.core.messages import shown

__all__ = [
    "KERNEL",
    "KEYWORDS",
    "POOLINGS",
    "check",
    "checked",
    "flag",
    "number",
    "one_of",
    "one_or_several",
    "optional",
    "several",
    "text",
    "whole",
]

Check = Callable[[str, Any], Any]
P = ParamSpec("P")
T = TypeVar("T")

_MOST_CHANNELS = 1 << 16
_MOST_CLASSES = 10**8
_LARGEST_WINDOW = 1024

POOLINGS = (
    *("", "avg", "max", "avgmax", "catavgmax"),
    *("fast", "fastavg", "fastmax", "fastavgmax", "fastcatavgmax"),
)


def whole(least: int, greatest: int, odd: bool = False) -> Check:
    """An integer in a range, NumPy's included, but not a bool."""

    def check(name: str, value: Any) -> int:
        try:
            if isinstance(value, bool | np.bool_):
                raise TypeError
            result = operator.index(value)
        except (TypeError, RuntimeError):  # RuntimeError: a tensor without data
            raise TypeError(f"{name} must be a whole number, got {shown(value)}") from None
        if odd and result % 2 == 0:
            raise ValueError(f"{name} must be odd, got {result}")
        return _in_range(name, result, least, greatest)

    return check


def number(least: float, greatest: float, open_below: bool = False) -> Check:
    """A number in a range; ``open_below`` excludes ``least``."""

    def check(name: str, value: Any) -> float:
        if not isinstance(value, numbers.Real) or isinstance(value, bool):
            raise TypeError(f"{name} must be a number, got {shown(value)}")
        if open_below and value == least:
            raise ValueError(f"{name} must be above {least}, got {value}")
        _in_range(name, value, least, greatest)
        return int(value) if isinstance(value, numbers.Integral) else float(value)

    return check


def _in_range(name: str, value: Any, least: float, greatest: float) -> Any:
    if not least <= value <= greatest:  # also if NaN
        raise ValueError(f"{name} must be in {least} … {greatest}, got {value}")
    return value


def flag(name: str, value: Any) -> bool:
    """True or False."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} must be True or False, got {shown(value)}")
    return bool(value)


def text(name: str, value: Any) -> str:
    """A string."""
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a string, got {shown(value)}")
    return value


def one_of(*choices: Any) -> Check:
    """One of the values."""

    def check(name: str, value: Any) -> Any:
        for choice in choices:
            if type(value) is type(choice) and value == choice:
                return value
        kinds = {type(choice) for choice in choices}
        error = ValueError if type(value) in kinds else TypeError
        raise error(f"{name} must be one of {', '.join(map(repr, choices))}, got {shown(value)}")

    return check


def several(each: Check, count: int | None = None, may_be_empty: bool = False) -> Check:
    """A sequence of values, as a tuple; of length ``count`` if given."""

    def check(name: str, value: Any) -> tuple[Any, ...]:
        if isinstance(value, np.ndarray):
            value = value.tolist()
        if not isinstance(value, Sequence) or isinstance(value, str | bytes | bytearray):
            raise TypeError(f"{name} must be a sequence, got {shown(value)}")
        if count is not None and len(value) != count:
            raise ValueError(f"{name} must have {count} values, got {shown(value)}")
        if not (value or may_be_empty):
            raise ValueError(f"{name} must have at least one value, got {shown(value)}")
        return tuple(each(f"{name}[{i}]", item) for i, item in enumerate(value))

    return check


def either(first: Check, *kinds: type, second: Check) -> Check:
    """``first`` for values of the given kinds, ``second`` for all others."""
    return lambda name, value: (first if isinstance(value, kinds) else second)(name, value)


def one_or_several(each: Check) -> Check:
    """A single value or a sequence of values."""
    return either(each, str, second=either(several(each), Sequence, np.ndarray, second=each))


def widths(least: int) -> Check:
    """Channels of each stage, where the stem has a fraction of the first stage's."""
    return several(whole(least, _MOST_CHANNELS))


def optional(each: Check) -> Check:
    """None, or a value that ``each`` accepts."""
    return either(lambda name, value: None, type(None), second=each)


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
