"""The library of a kernel for an instruction set, and how it is compiled.

Wheels ship compiled libraries. The hook that compiles them (``tools/wheel_hook.py``) runs without
torch, so neither this module nor its imports may need it.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path

from ops.cpu import compiler, instruction_sets
from ops.cpu.structures import included

__all__ = [
    "GEMM",
    "SHIPPED",
    "calls_gemm",
    "compile_into",
    "reads_packed_weights",
    "shipped",
    "sources",
    "stem",
]

SOURCES = Path(__file__).parent
GEMM = "gemm"  # the kernel of linear layers, called by others
# In wheels. Libraries in the package are as trustworthy as its Python code.
SHIPPED = SOURCES / "compiled"


def sources() -> dict[str, Path]:
    """The source of each kernel, ``<folder>/<name>.cpp``, by name."""
    return {path.stem: path for path in sorted(SOURCES.glob("*/*.cpp"))}


def calls_gemm(name: str) -> bool:
    """Whether a kernel calls the function of :data:`GEMM` for the same instruction set."""
    return SOURCES / "gemm" / "call.h" in included(sources()[name], SOURCES)


def reads_packed_weights(name: str) -> bool:
    """Whether a kernel reads weights that :data:`GEMM` packed for its vectors."""
    folder = SOURCES / GEMM
    return name != GEMM and any(p.parent == folder for p in included(sources()[name], SOURCES))


def stem(name: str, isa: str, machine: str | None = None) -> str:
    """The start of a library's file name: kernel, instruction set and a digest.

    The digest covers sources, flags and platform, so outdated libraries are never loaded.

    Args:
        machine: the architecture; default :func:`ops.cpu.instruction_sets.machine`.
    """
    digest = hashlib.sha256()
    source = sources().get(name, SOURCES / f"{name}.cpp")
    for path in sorted(included(source, SOURCES)):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    platform_name = f"{sys.platform}-{machine or instruction_sets.machine()}"
    digest.update(repr([platform_name, instruction_sets.flags(isa)]).encode())
    return f"{name}-{isa}-{digest.hexdigest()[:16]}"


def shipped(stem: str) -> Path | None:
    """The library that came with the package, if it was built from the package's sources."""
    path = SHIPPED / f"{stem}.so"
    return path if path.is_file() else None


def compile_into(
    built: Path,
    name: str,
    isa: str,
    compilers: Sequence[Sequence[str]],
    options: Sequence[str] = (),
) -> str:
    """Compile the library ``built`` with the first compiler that accepts it; return its path.

    Args:
        built: the output, in a folder that also holds the compiler's temporary files.
        compilers: commands, see :func:`ops.cpu.compiler.find_compilers`; at least one.
        options: additional compiler options.

    Raises:
        RefusedError, CompilerError, OSError: see :func:`ops.cpu.compiler.run`; the first if no
            compiler accepts it.
    """
    flags = [*instruction_sets.flags(isa), *options, f"-I{SOURCES}", str(sources()[name])]
    refused: compiler.RefusedError | None = None
    for words in compilers:
        try:
            compiler.run([*words, *flags, "-o", str(built)], built.parent)
        except compiler.RefusedError as error:
            refused = error
        else:
            return compiler.label(words)
    assert refused is not None
    raise refused
