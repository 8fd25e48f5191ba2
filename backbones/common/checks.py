"""Checks of arguments, as composable functions.

A check takes an argument's name and value, and returns the value as a built-in type. It raises a
TypeError for another kind of value, and a ValueError for one out of range.
"""

from __future__ import annotations

import numbers
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from backbones.common.messages import shown

Check = Callable[[str, Any], Any]


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
    """A number in a range, as a float; ``open_below`` excludes ``least``."""

    def check(name: str, value: Any) -> float:
        if not isinstance(value, numbers.Real) or isinstance(value, bool):
            raise TypeError(f"{name} must be a number, got {shown(value)}")
        if open_below and value == least:
            raise ValueError(f"{name} must be above {least}, got {value}")
        return float(_in_range(name, value, least, greatest))

    return check


def _in_range(name: str, value: Any, least: float, greatest: float) -> Any:
    if not least <= value <= greatest:  # also if NaN
        raise ValueError(f"{name} must be in {least} … {greatest}, got {value}")
    return value


def format_problem(content: Mapping[str, Any], known: int = 1) -> str | None:
    """Why a file whose ``format`` is in its content cannot be read; None if it can.

    Files from before there was such an entry are of format 1.
    """
    if (found := content.get("format", 1)) == known:
        return None
    return (
        f"has format {shown(found)}, this version reads {known}: use the version that wrote it, or "
        "a newer one"
    )


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


def optional(each: Check) -> Check:
    """None, or a value that ``each`` accepts."""
    return either(lambda name, value: None, type(None), second=each)
