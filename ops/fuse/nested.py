"""What lists, tuples and dictionaries hold, as the arguments of ATen's operators.

Everything else is a leaf, named tuples included. :mod:`torch.utils._pytree` does the same ten times
slower.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

__all__ = ["leaves", "mapped"]


def leaves(value: Any) -> Iterator[Any]:
    """The leaves of a value, in order."""
    kind = type(value)
    if kind is list or kind is tuple:
        for part in value:
            yield from leaves(part)
    elif kind is dict:
        for part in value.values():
            yield from leaves(part)
    else:
        yield value


def mapped(kind: type, function: Callable[[Any], Any], value: Any) -> Any:
    """A copy of a value, with leaves of a class replaced by what a function gives for them."""
    if isinstance(value, kind):
        return function(value)
    if type(value) is list:
        return [mapped(kind, function, part) for part in value]
    if type(value) is tuple:
        return tuple([mapped(kind, function, part) for part in value])
    if type(value) is dict:
        return {key: mapped(kind, function, part) for key, part in value.items()}
    return value
