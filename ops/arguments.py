"""Argument checks of public ops, derived from their annotations.

Users may pass None, or a list instead of a tensor; the error then names the argument instead of
coming from the inside of the op.
"""

from __future__ import annotations

import functools
import inspect
import reprlib
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, NamedTuple, ParamSpec, TypeVar, Union

import torch
from torch import Tensor
from torch.fx import Proxy

P = ParamSpec("P")
R = TypeVar("R")

# Symbolic values while tracing are accepted, too.
_KINDS: dict[Any, tuple[type, ...]] = {
    int: (int, Integral, torch.SymInt, Proxy),
    float: (float, int, Real, torch.SymFloat, torch.SymInt, Proxy),
    Tensor: (Tensor, Proxy),
}
_DESCRIPTIONS = {int: "a whole number", float: "a number", Tensor: "a tensor", type(None): "None"}


class _Argument(NamedTuple):
    name: str
    matches: Callable[[Any], bool]
    expected: str
    rank: int | None
    least: int | None

    def check(self, value: Any) -> None:
        if not self.matches(value):
            raise TypeError(f"{self.name} must be {self.expected}, got {reprlib.repr(value)}")
        if self.rank is not None and isinstance(value, Tensor) and value.ndim != self.rank:
            raise ValueError(
                f"{self.name} must have {self.rank} dimensions, got {tuple(value.shape)}"
            )
        if self.least is not None and isinstance(value, Integral) and value < self.least:
            raise ValueError(f"{self.name} must be {self.least} or more, got {value}")


def checked(
    *, ranks: Mapping[str, int] | None = None, least: Mapping[str, int] | None = None
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorates an op: checks its arguments against their annotations.

    There are no checks while the op is compiled or traced, since sizes are symbolic then.

    Args:
        ranks: number of dimensions of tensors, by argument.
        least: minimum of integers, by argument, if not 1.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        hints = typing.get_type_hints(function)
        arguments = {
            name: _Argument(
                name,
                *_kind(hints[name]),
                (ranks or {}).get(name),
                (least or {}).get(name, 1) if hints[name] is int else None,
            )
            for name in inspect.signature(function).parameters
        }
        in_order = tuple(arguments.values())

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            if not (torch.compiler.is_compiling() or torch.jit.is_tracing()):
                for argument, value in zip(in_order, args, strict=False):
                    argument.check(value)
                for name, value in kwargs.items():
                    if name in arguments:
                        arguments[name].check(value)
            return function(*args, **kwargs)

        return call

    return decorate


def require_tensor(name: str, value: Any) -> None:
    """Check that ``value`` is a tensor, or a tracer's proxy of one.

    Raises:
        TypeError: it is not.
    """
    if not isinstance(value, _KINDS[Tensor]):
        raise TypeError(f"{name} must be a tensor, got {reprlib.repr(value)}")


def require_shapes(
    known: Mapping[str, int] | None = None, /, **tensors: tuple[Tensor | None, str]
) -> dict[str, int]:
    """Check the shapes of tensors, or None, against their axes, as in ``"batch heads 2 dim"``.

    An axis is a number or a name, whose size in the first tensor is that in all others, unless it
    is ``known``. ``...`` stands for any number of axes, which may differ.

    Returns:
        The sizes by name.

    Raises:
        ValueError: the shape of a tensor is different; the message names it.
    """
    sizes = dict(known or {})
    parse = _axes if torch.compiler.is_compiling() else _known_axes
    for name, (t, axes) in tensors.items():
        if t is None:
            continue
        before, after, is_open = parse(axes)
        shape = t.shape
        free = len(shape) - len(before) - len(after)
        fits = free == 0 or (is_open and free > 0)
        if fits:
            found = shape if free == 0 else (*shape[: len(before)], *shape[len(before) + free :])
            for axis, size in zip(before + after, found, strict=True):
                if size != (axis if type(axis) is int else sizes.setdefault(axis, size)):
                    fits = False
        if not fits:
            wanted = [str(sizes.get(axis, axis)) for axis in axes.split()]
            text = ", ".join(wanted) if len(wanted) > 1 else f"{wanted[0]},"
            raise ValueError(f"{name} must be ({text}), got {tuple(shape)}")
    return sizes


def _axes(axes: str) -> tuple[tuple[Any, ...], tuple[Any, ...], bool]:
    """The axes before and after ``...``, names or numbers, and whether there are those."""
    before, rest, after = axes.partition("...")

    def split(part: str) -> tuple[Any, ...]:
        return tuple(int(axis) if axis.isdecimal() else axis for axis in part.split())

    return split(before), split(after), bool(rest)


_known_axes = functools.cache(_axes)


def require_like(
    of: str,
    x: Tensor,
    others: Mapping[str, tuple[Tensor | None, Sequence[int]]],
    exact: Sequence[str] = (),
) -> None:
    """Check the shapes of tensors, and their dtypes and devices against those of another.

    Args:
        of: the name of ``x``, which must be floating-point.
        others: tensors, or None, and the shapes that they must have, by name.
        exact: names of those that may not be in float32 instead of the dtype of ``x``.

    Raises:
        ValueError: a tensor is different; the message names it.
    """
    if not x.is_floating_point():
        raise ValueError(f"{of} must have a floating-point dtype, got {x.dtype}")
    dtype, device = x.dtype, x.device
    for name, (t, shape) in others.items():
        if t is None:
            continue
        if t.shape != shape:
            raise ValueError(
                f"{name} must be {tuple(shape)} for {of} of shape {tuple(x.shape)}, "
                f"got {tuple(t.shape)}"
            )
        if t.dtype != dtype and (t.dtype != torch.float32 or name in exact):
            either = dict.fromkeys((dtype,) if name in exact else (dtype, torch.float32))
            raise ValueError(
                f"{name} must be {' or '.join(map(str, either))} for {of} of {dtype}, got {t.dtype}"
            )
        if t.device != device:
            raise ValueError(f"{name} is on {t.device}, {of} on {device}")


def _kind(hint: Any) -> tuple[Callable[[Any], bool], str]:
    """A function that tests whether a value matches the type hint, and the hint in words."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if isinstance(hint, TypeVar):
        origin, parts = Union, hint.__constraints__
    if origin in (Union, types.UnionType):
        tests, texts = zip(*map(_kind, parts), strict=True)
        if all(isinstance(part, type) and part not in (int, float) for part in parts):
            any_of = tuple(kind for part in parts for kind in _KINDS.get(part, (part,)))
            # Faster than a test for each.
            return lambda value: isinstance(value, any_of), " or ".join(texts)
        return lambda value: any(test(value) for test in tests), " or ".join(texts)
    if origin in (tuple, Sequence):
        (each, text), count = _kind(parts[0]), len(parts) if origin is tuple else None
        return (
            lambda value: (
                isinstance(value, Sequence)
                and not isinstance(value, str | bytes)
                and count in (None, len(value))
                and all(map(each, value))
            ),
            f"a sequence, each {text}",
        )
    kinds = _KINDS.get(hint, origin or hint)
    text = "a function" if origin is Callable else _DESCRIPTIONS.get(hint) or f"a {hint.__name__}"
    if hint in (int, float):  # exclude bool
        return lambda value: isinstance(value, kinds) and not isinstance(value, bool), text
    return lambda value: isinstance(value, kinds), text
