"""Which library a kernel has for an instruction set, and how it is compiled.

Wheels bring compiled libraries; the hook that compiles them (``tools/wheel_hook.py``) runs
where torch need not be, so that neither this module nor what it imports needs it.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path

from ops.cpu import compiler, instruction_sets
from ops.cpu.structures import included

__all__ = ["GEMM", "SHIPPED", "calls_gemm", "compile_into", "shipped", "sources", "stem"]

SOURCES = Path(__file__).parent
GEMM = "gemm"  # the kernel of linear layers, which others call
# Wheels have it. What lies in the package is as trustworthy as its Python.
SHIPPED = SOURCES / "compiled"


def sources() -> dict[str, Path]:
    """The source of each kernel, ``<folder>/<name>.cpp``, by its name."""
    return {path.stem: path for path in sorted(SOURCES.glob("*/*.cpp"))}


def calls_gemm(name: str) -> bool:
    """Whether a kernel wants the function of :data:`GEMM`, for the same instruction set."""
    return SOURCES / "gemm" / "call.h" in included(sources()[name], SOURCES)


def stem(name: str, isa: str, machine: str | None = None) -> str:
    """How the file of a library begins: kernel, instruction set, and a digest of all it depends on.

    These are sources, flags and platform; so no library is ever loaded that others were made from.

    Args:
        machine: the architecture, as of :func:`ops.cpu.instruction_sets.machine`, the default.
    """
    digest = hashlib.sha256()
    source = sources().get(name, SOURCES / f"{name}.cpp")
    for path in sorted(included(source, SOURCES)):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    platform_name = f"{sys.platform}-{machine or instruction_sets.machine()}"
    digest.update(repr([platform_name, instruction_sets.flags(isa)]).encode())
    return f"{name}-{isa}-{digest.hexdigest()[:16]}"


def shipped(stem: str) -> Path | None:
    """The library that came with the package, if it was made from the sources beside it."""
    path = SHIPPED / f"{stem}.so"
    return path if path.is_file() else None


def compile_into(
    built: Path,
    name: str,
    isa: str,
    compilers: Sequence[Sequence[str]],
    options: Sequence[str] = (),
) -> str:
    """Make the library ``built`` with the first compiler that takes it, whose path is returned.

    Args:
        built: in a folder where the compiler may leave what it needs for a while.
        compilers: commands, as of :func:`ops.cpu.compiler.find_compilers`; at least one.
        options: further ones.

    Raises:
        RefusedError, CompilerError, OSError: see :func:`ops.cpu.compiler.run`; the first if no
            compiler takes it.
    """
    flags = [*instruction_sets.flags(isa), *options, f"-I{SOURCES}", str(sources()[name])]
    refused: compiler.RefusedError | None = None
    for words in compilers:
        try:
            compiler.run([*words, *flags, "-o", str(built)], built.parent)
        except compiler.RefusedError as error:
            refused = error
        else:
            return words[0]
    assert refused is not None
    raise refused
