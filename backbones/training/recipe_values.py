"""Conversion of values from YAML or a command line to the types of their keys."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
import unicodedata
from collections.abc import Iterable
from typing import Any

from backbones.common.errors import RecipeError
from backbones.core.messages import shown
from backbones.training.recipe_yaml import parse_yaml

__all__ = ["as_type_of", "inner_type", "nearest"]

_SCALARS = (int, float, str, bool)
_TRUTH = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
_MOST_VALUES, _DEEPEST = 10_000, 20
_ERRORS = (TypeError, ValueError, OverflowError)


def nearest(kind: str, value: str, valid: Iterable[Any]) -> str:
    """An error message with the valid names closest to a wrong one."""
    names = [str(name) for name in valid]
    near = difflib.get_close_matches(value[:80], names, n=4, cutoff=0.5) or sorted(names)[:12]
    return f"unknown {kind} {shown(value)}" + (f"; did you mean {', '.join(near)}?" if near else "")


def inner_type(hint: Any) -> Any:
    """``int`` of ``int | None``."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return next(a for a in typing.get_args(hint) if a is not type(None))
    return hint


def as_type_of(f: dataclasses.Field[Any], hint: Any, value: Any) -> Any:
    """``value`` as the type ``hint`` of a key. YAML 1.1 reads 1e-3 as a string; flags all are.

    Raises:
        RecipeError: another type, or none of the key's choices; text with control characters, or
            empty text if the default is not empty.
    """
    name, inner = f.name, inner_type(hint)
    if inner is not hint and (
        value is None or (isinstance(value, str) and value.lower() in ("none", "null"))
    ):
        converted: Any = None
    else:
        try:
            converted = _convert(inner, value)
        except _ERRORS:
            label = getattr(inner, "__name__", str(inner)) if inner in _SCALARS else str(inner)
            raise RecipeError(f"{name} must be {label}, not {shown(value)}") from None
    if isinstance(converted, str):
        _check_text(name, converted, may_be_empty=f.default == "")
    choices = f.metadata["choices"]
    if choices and converted not in choices:
        raise RecipeError(
            f"{name} must be one of {', '.join(map(str, choices))}, not {shown(value)}"
        )
    return converted


def _check_text(name: str, text: str, may_be_empty: bool) -> None:
    if not text and not may_be_empty:
        raise RecipeError(f"{name} is empty: give a value, or omit it")
    # Control characters, and command-line bytes that are not UTF-8.
    if any(unicodedata.category(c) in ("Cc", "Cs") for c in text):
        raise RecipeError(f"{name} must be printable text, not {shown(text)}")


def _convert(kind: Any, value: Any) -> Any:
    if kind is bool:
        if isinstance(value, (bool, int, str)) and str(value).lower() in _TRUTH:
            return _TRUTH[str(value).lower()]
        return _fail(value)
    if kind is int:
        if isinstance(value, bool) or (isinstance(value, float) and not value.is_integer()):
            _fail(value)
        return int(value)
    if kind is float:
        return _fail(value) if isinstance(value, bool) else float(value)
    if kind is str:
        return value if isinstance(value, str) else _fail(value)
    if typing.get_origin(kind) is tuple:
        if isinstance(value, (list, tuple)) and len(value) == 1 and isinstance(value[0], str):
            value = value[0]  # a command line's single word, such as 1,2
        if isinstance(value, str):
            value = parse_yaml(value) if value.startswith("[") else value.split(",")
        if not isinstance(value, (list, tuple)):
            _fail(value)
        return tuple(_convert(typing.get_args(kind)[0], v) for v in value)
    if isinstance(value, str):
        value = parse_yaml(value)
    if not isinstance(value, dict):
        _fail(value)
    key_type, value_type = typing.get_args(kind)
    if value_type is Any:
        _check_plain(value)
        return {_convert(key_type, k): v for k, v in value.items()}
    return {_convert(key_type, k): _convert(value_type, v) for k, v in value.items()}


def _check_plain(value: Any) -> None:
    """Only plain values: numbers, text, lists, mappings."""
    pending, seen = [(value, 0)], 0
    while pending:
        value, depth = pending.pop()
        seen += 1
        if seen > _MOST_VALUES or depth > _DEEPEST:
            _fail(value)
        if isinstance(value, dict):
            pending += [(v, depth + 1) for pair in value.items() for v in pair]
        elif isinstance(value, list):
            pending += [(v, depth + 1) for v in value]
        elif value is not None and not isinstance(value, _SCALARS):
            _fail(value)


def _fail(value: Any) -> Any:
    raise ValueError(shown(value))
