"""A call of a kernel: its result, and the arguments of the C function in memory."""

from __future__ import annotations

import ctypes
import operator
import struct
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from ops.cpu.activations import ACTIVATIONS

Words = list[int | tuple[Tensor, int]]
"""Structures as 8-byte words: numbers, and addresses as tensors with offsets in bytes."""


class Call(NamedTuple):
    """The result and the C arguments of a call.

    Attributes:
        result: what the operator returns, allocated; the kernel fills it in.
        arguments: gives the values of those parameters of the C function, and of the fields of its
            structures, that differ from the operator's arguments. It is not called if only shapes
            are needed or the first result is empty; if it gives nothing, nor is the function.

    A value is a number, a tensor (its address), a tensor with an offset in bytes, the name of an
    activation, or a sequence for an array. A structure that is a field, or is given under its
    parameter's name, is a dictionary of its own fields, several of them a list. Fields that are
    missing or None are zeros and null pointers.
    """

    result: Any
    arguments: Callable[[], Mapping[str, Any]]

    def results(self) -> list[Tensor]:
        """The allocated tensors."""
        result = self.result
        return [] if result is None else [result] if isinstance(result, Tensor) else list(result)


def sizes_of(x: Tensor, axes: str) -> dict[str, int]:
    """The sizes of the axes of ``x`` by names such as ``"batch height _"``; ``_`` is skipped."""
    named = dict(zip(axes.split(), x.shape, strict=True))
    named.pop("_", None)
    return named


def names_of(parameters: Mapping[str, Any]) -> set[str]:
    """The names of parameters (:func:`ops.cpu.call.structures.parameters`) and of their fields."""
    kinds = [kind for kind in parameters.values() if kind is not None]
    return {*parameters, *(name for kind in kinds for name, _ in kind._fields_)}


def arguments_by_name(
    parameters: Mapping[str, Any], given: dict[str, Any]
) -> list[int | Tensor | Words]:
    """The arguments of a C function in order.

    Args:
        parameters: see :func:`ops.cpu.call.structures.parameters`.
        given: see :class:`Call`, all of them.
    """
    found: list[Any] = []
    for name, kind in parameters.items():
        value = given[name] if kind is None or name in given else given
        if kind is None:
            found.append(value)
        else:
            found.append([])
            for fields in value if isinstance(value, list) else (value,):
                _add_words(found[-1], kind, fields)
    return found


def _add_words(words: Words, kind: Any, value: Any) -> None:
    """Add ``value`` as stored in a number, a pointer, an array or a structure of type ``kind``."""
    if value is None:
        words += [0] * (ctypes.sizeof(kind) // 8)
    elif kind is ctypes.c_int64:
        words.append(ACTIVATIONS.index(value) if type(value) is str else operator.index(value))
    elif kind is ctypes.c_void_p:
        words.append((value, 0) if isinstance(value, Tensor) else value)
    elif kind is ctypes.c_double:
        words += struct.unpack("=q", struct.pack("=d", value))
    elif isinstance(value, dict):
        for name, of in kind._fields_:
            _add_words(words, of, value.get(name))
    else:
        for _, number in zip(range(kind._length_), value, strict=True):
            _add_words(words, kind._type_, number)


def pack(argument: int | Tensor | Words) -> Any:
    """The argument as ctypes passes it; tensors and structures by address."""
    if isinstance(argument, int):
        return ctypes.c_int64(argument)
    if isinstance(argument, Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    addresses = [w if isinstance(w, int) else w[0].data_ptr() + w[1] for w in argument]
    return ctypes.byref((ctypes.c_int64 * len(addresses))(*addresses))
