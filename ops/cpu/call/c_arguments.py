"""A call of a kernel: its result, and the arguments of the C function in memory."""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from ops.cpu.activations import ACTIVATIONS


class Call(NamedTuple):
    """The result and the C arguments of a call.

    Attributes:
        result: what the operator returns, allocated; the kernel fills it in.
        arguments: makes the arguments of the C function; not called if only shapes are needed or
            the first result is empty. Either all of them in order: numbers, tensors, structures of
            numbers or :class:`Addresses`, and lists of the latter; or, by name, those parameters
            and fields of structures that differ from the operator's arguments.
    """

    result: Any
    arguments: Callable[[], Sequence[Any] | dict[str, Any]]

    def results(self) -> list[Tensor]:
        """The allocated tensors."""
        result = self.result
        return [] if result is None else [result] if isinstance(result, Tensor) else list(result)


class Addresses(NamedTuple):
    """A structure of pointers and numbers.

    Attributes:
        structure: see :func:`ops.cpu.call.structures.structure`; each field has 8 bytes or is
            itself such a structure.
        fields: the values: a tensor (its address), a tensor with an offset in bytes, a number, the
            name of an activation, or the fields of a nested structure. Fields that are missing or
            None are zeros and null pointers.
    """

    structure: Any
    fields: dict[str, Any]

    def words(self) -> list[int | tuple[Tensor, int]]:
        """The 8-byte words in order: numbers, and tensors with offsets in bytes."""
        found: list[Any] = []
        for name, kind in self.structure._fields_:
            value = self.fields.get(name)
            if isinstance(value, Tensor):
                found.append((value, 0))
            elif value is None:
                found += [0] * (ctypes.sizeof(kind) // 8)
            elif isinstance(value, dict):
                found += Addresses(kind, value).words()
            elif isinstance(value, float):
                found += struct.unpack("=q", struct.pack("=d", value))
            else:
                found.append(_number(value))
        return found


def sizes_of(x: Tensor, axes: str) -> dict[str, int]:
    """The sizes of the axes of ``x`` by names such as ``"batch height _"``; ``_`` is skipped."""
    named = dict(zip(axes.split(), x.shape, strict=True))
    named.pop("_", None)
    return named


def numbers(structure: Any, fields: dict[str, Any]) -> Any:
    """A structure of numbers and arrays of numbers; activations are given by name."""
    known = {name: _number(fields[name]) for name, _ in structure._fields_ if name in fields}
    return structure(**known)


def _number(value: Any) -> Any:
    """The value as stored in a structure: activations by index, sequences as tuples."""
    if isinstance(value, str):
        return ACTIVATIONS.index(value)
    return tuple(value) if isinstance(value, list) else value


def names_of(parameters: Mapping[str, Any]) -> set[str]:
    """The names of parameters (:func:`ops.cpu.call.structures.parameters`) and of their fields."""
    kinds = [kind for kind in parameters.values() if kind is not None]
    return {*parameters, *(name for kind in kinds for name, _ in kind._fields_)}


def arguments_by_name(parameters: Mapping[str, Any], given: dict[str, Any]) -> list[Any]:
    """The arguments of a C function in order.

    Args:
        parameters: see :func:`ops.cpu.call.structures.parameters`.
        given: values of parameters and of their structures' fields. A structure that is a
            parameter of its own name, or a list of structures, has fields of its own.
    """
    return [
        _argument(kind, given[name] if kind is None or name in given else given)
        for name, kind in parameters.items()
    ]


def _argument(kind: Any, value: Any) -> Any:
    if kind is None or isinstance(value, ctypes.Structure):
        return value
    has_addresses = _has_addresses(kind)
    if isinstance(value, list):
        made = [_argument(kind, fields) for fields in value]
        return made if has_addresses else (kind * len(made))(*made)
    return Addresses(kind, value) if has_addresses else numbers(kind, value)


@functools.cache
def _has_addresses(kind: Any) -> bool:
    return any(of is ctypes.c_void_p or issubclass(of, ctypes.Structure) for _, of in kind._fields_)


def words_of(argument: Any) -> list[int | tuple[Tensor, int]] | None:
    """The words of pointer structures or of a tensor; None for arguments without addresses."""
    if isinstance(argument, Addresses):
        return argument.words()
    if isinstance(argument, list):
        return [word for addresses in argument for word in addresses.words()]
    return None


def require_same_bytes(library: ctypes.CDLL | None, argument: Any) -> None:
    """Raise a RuntimeError if the library's structures differ from the headers' declarations."""
    of = argument[0] if isinstance(argument, list) else argument
    kind: Any = of.structure if isinstance(of, Addresses) else type(argument)
    if issubclass(kind, ctypes.Array):
        kind = kind._type_
    if issubclass(kind, ctypes.Structure):
        _compare_bytes(library, kind)


@functools.lru_cache(maxsize=256)
def _compare_bytes(library: Any, kind: Any) -> None:
    function = getattr(library, f"{kind.__name__.replace('::', '_')}_bytes")
    function.restype = ctypes.c_int64
    if function() != ctypes.sizeof(kind):
        raise RuntimeError(
            f"{kind.__name__} has {function()} bytes in the library and {ctypes.sizeof(kind)} here"
        )


def pack(argument: Any) -> Any:
    """The argument as ctypes passes it; tensors and structures by address."""
    if isinstance(argument, int):
        return ctypes.c_int64(argument)
    if isinstance(argument, Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    words = words_of(argument)
    if words is None:
        return ctypes.byref(argument)
    addresses = [w if isinstance(w, int) else w[0].data_ptr() + w[1] for w in words]
    return ctypes.byref((ctypes.c_int64 * len(addresses))(*addresses))
