"""The kernels' C interface: structures and parameters, parsed from their declarations."""

from __future__ import annotations

import ctypes
import functools
import re
from pathlib import Path
from typing import Any

from ops.cpu.build.sources import SOURCES, included, read

_OVER_LINES = re.DOTALL | re.MULTILINE
_SCALARS: dict[str, Any] = {"int64_t": ctypes.c_int64, "double": ctypes.c_double}
_DECLARATION = re.compile(r"^(?:const )?(\w+)\s*(.*)$")
_PARAMETER = re.compile(r"(?:const )?([\w:]+)\*? (\w+)")
_FIELD = re.compile(r"^(\*?)\s*(\w+)(?:\[(\w+)\])?$")


@functools.cache
def structure(header: str, name: str) -> Any:
    """The ctypes structure with the fields of ``name`` in order.

    Args:
        header: a file below ``ops/cpu``, such as ``"norm/norm.cpp"``; its includes are searched,
            too, nearest first.
        name: with its namespace, such as ``"norm::Problem"``. Fields may be ``int64_t``,
            ``double``, pointers, arrays of numbers, and structures of the same namespace.

    Raises:
        ValueError: no such structure, or a field of another type.
    """
    space, _, plain = name.rpartition("::")
    pattern = re.compile(rf"^struct {plain} {{(.*?)^}};", _OVER_LINES)
    for path in included(SOURCES / header, read=_text):
        text = re.sub(r"//[^\n]*", "", _text(path))
        found = pattern.search(text) if f"namespace {space} {{" in text else None
        if found is not None:
            break
    else:
        raise ValueError(f"{header} declares no structure {name}")
    fields = []
    for declaration in found[1].partition("(")[0].split(";")[:-1]:
        fields += _fields_of(" ".join(declaration.split()), header, name, text)
    return type(name, (ctypes.Structure,), {"_fields_": fields})


@functools.cache
def parameters(library: str, function: str) -> dict[str, Any]:
    """The parameters of a C function by name: structures; None for numbers and other pointers.

    Args:
        library: the name of its source, ``ops/cpu/<folder>/<library>.cpp``.
        function: declared there as ``extern "C" int``.

    Raises:
        ValueError: no such function, or a structure that :func:`structure` cannot read.
    """
    (source,) = SOURCES.glob(f"*/{library}.cpp")
    found = re.search(rf'^extern "C" int {function}\((.*?)\)', _text(source), _OVER_LINES)
    if found is None:
        raise ValueError(f"{library}.cpp declares no function {function}")
    header = str(source.relative_to(SOURCES))
    declared = _PARAMETER.findall(" ".join(found[1].split()))
    return {name: structure(header, kind) if "::" in kind else None for kind, name in declared}


@functools.cache
def _text(path: Path) -> str:
    return read(path)


def _fields_of(declaration: str, header: str, name: str, text: str) -> list[tuple[str, Any]]:
    """The fields in ``const float *a, *b`` or ``int64_t sizes[3], axes``."""
    whole = _DECLARATION.match(declaration)
    assert whole is not None
    kind, declared = whole.groups()
    fields = []
    for part in declared.replace("* ", "*").split(","):
        one = _FIELD.match(part.strip())
        if one is None:
            raise ValueError(f"{header}: cannot read the field {declaration!r} of {name}")
        pointer, field, count = one.groups()
        of = ctypes.c_void_p if pointer else _SCALARS.get(kind)
        if of is None:
            of = structure(header, f"{name.rpartition('::')[0]}::{kind}")
        fields.append((field, of if count is None else of * _number(count, text)))
    return fields


def _number(count: str, text: str) -> int:
    """The value of a literal or of a constant in the header."""
    if count.isdigit():
        return int(count)
    constant = re.search(rf"constexpr \w+ {count} = (\d+);", text)
    if constant is None:
        raise ValueError(f"{count} is not defined")
    return int(constant[1])
