"""A call of a kernel: its result, and the arguments of the C function in memory."""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ops.cpu.activations import ACTIVATIONS

__all__ = ["Addresses", "Call", "pack", "problem_of", "require_same_bytes", "words_of"]


class Addresses(NamedTuple):
    """A structure of pointers and numbers.

    Attributes:
        structure: see :func:`ops.cpu.structures.structure`; each field has 8 bytes or is itself
            such a structure.
        fields: the values: a tensor (its address), a tensor with an offset in bytes, a number, or
            the ``Addresses`` of a nested structure. Fields that are missing or None are zeros and
            null pointers.
    """

    structure: Any
    fields: dict[str, Any]

    def words(self) -> list[int | tuple[Tensor, int]]:
        """The 8-byte words in order: numbers, and tensors with offsets in bytes."""
        found: list[Any] = []
        for name, kind in self.structure._fields_:
            value = self.fields.get(name)
            if isinstance(value, Addresses):
                found += value.words()
            elif value is None:
                found += [0] * (ctypes.sizeof(kind) // 8)
            elif isinstance(value, Tensor):
                found.append((value, 0))
            elif isinstance(value, float):
                found += struct.unpack("=q", struct.pack("=d", value))
            else:
                found.append(value)
        return found


def problem_of(structure: Any, x: Tensor, axes: str = "", **fields: Any) -> Any:
    """A structure of numbers: the sizes that a kernel is called with.

    Args:
        structure: see :func:`ops.cpu.structures.structure`; its field ``bfloat16`` is set if ``x``
            has that dtype.
        axes: the fields for the sizes of the axes of ``x``, such as ``"batch height width dim"``;
            ``_`` skips an axis.
        fields: all other fields; activations are given by name.
    """
    sizes = dict(zip(axes.split(), x.shape, strict=False))
    sizes.pop("_", None)
    numbers = {n: ACTIVATIONS.index(v) if isinstance(v, str) else v for n, v in fields.items()}
    return structure(bfloat16=x.dtype == torch.bfloat16, **sizes, **numbers)


class Call(NamedTuple):
    """The result and the C arguments of a call.

    Attributes:
        result: what the operator returns, allocated; the kernel fills it in.
        arguments: makes the arguments of the C function: numbers, tensors, structures of numbers or
            :class:`Addresses`, and lists of the latter; not called if only shapes are needed or the
            first result is empty.
    """

    result: Any
    arguments: Callable[[], Sequence[Any]]

    def results(self) -> list[Tensor]:
        """The allocated tensors."""
        result = self.result
        return [] if result is None else [result] if isinstance(result, Tensor) else list(result)


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
