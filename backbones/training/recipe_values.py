"""What YAML or a command line gave, as the type of its key; or an error that says what is right."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable
from typing import Any

import yaml

from backbones.training.errors import RecipeError

__all__ = ["as_type_of", "inner_type", "nearest"]

_SCALARS = (int, float, str, bool)
_TRUTH = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def nearest(kind: str, value: str, valid: Iterable[str]) -> str:
    """A sentence that names the valid names closest to a wrong one."""
    names = list(valid)
    near = difflib.get_close_matches(value, names, n=4, cutoff=0.5) or sorted(names)[:12]
    return f"unknown {kind} {value!r}; did you mean {', '.join(near)}?"


def inner_type(hint: Any) -> Any:
    """``int`` of ``int | None``."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return next(a for a in typing.get_args(hint) if a is not type(None))
    return hint


def as_type_of(f: dataclasses.Field[Any], hint: Any, value: Any) -> Any:
    """``value`` as the type ``hint`` of a key. YAML 1.1 reads 1e-3 as a string; flags all are.

    Raises:
        RecipeError: it is of another type, or none of the key's choices.
    """
    name, inner = f.name, inner_type(hint)
    if inner is not hint and (value is None or str(value).lower() in ("none", "null")):
        converted: Any = None
    else:
        try:
            converted = _convert(inner, value)
        except (TypeError, ValueError, yaml.YAMLError):
            label = getattr(inner, "__name__", str(inner)) if inner in _SCALARS else str(inner)
            raise RecipeError(f"{name} must be {label}, not {value!r}") from None
    choices = f.metadata["choices"]
    if choices and converted not in choices:
        raise RecipeError(f"{name} must be one of {', '.join(map(str, choices))}, not {value!r}")
    return converted


def _convert(kind: Any, value: Any) -> Any:
    if kind is bool:
        if isinstance(value, bool):
            return value
        return _TRUTH[value.lower()] if str(value).lower() in _TRUTH else _fail(value)
    if kind is int:
        if isinstance(value, bool) or (isinstance(value, float) and not value.is_integer()):
            _fail(value)
        return int(value)
    if kind is float:
        return _fail(value) if isinstance(value, bool) else float(value)
    if kind is str:
        return value if isinstance(value, str) else _fail(value)
    if typing.get_origin(kind) is tuple:
        if isinstance(value, str):
            value = yaml.safe_load(value) if value.startswith("[") else value.split(",")
        elif len(value) == 1 and isinstance(value[0], str):
            return _convert(kind, value[0])
        return tuple(_convert(typing.get_args(kind)[0], v) for v in value)
    if isinstance(value, str):
        value = yaml.safe_load(value)
    if not isinstance(value, dict):
        _fail(value)
    key_type, value_type = typing.get_args(kind)
    if value_type is Any:
        return {_convert(key_type, k): v for k, v in value.items()}
    return {_convert(key_type, k): _convert(value_type, v) for k, v in value.items()}


def _fail(value: Any) -> Any:
    raise ValueError(value)
