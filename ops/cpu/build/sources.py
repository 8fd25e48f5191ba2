"""The kernels' sources, and how a library is compiled from them.

The hook that compiles the libraries of wheels (``tools/wheel_hook.py``) runs without torch, so
neither this module nor its imports may need it.
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from ops.cpu import instruction_sets
from ops.cpu.build import compiler

SOURCES = Path(__file__).parents[1]  # the include path
GEMM = "gemm"  # the kernel of linear layers, called by others


def suffix(system: str) -> str:
    """The suffix of libraries for a system, as in ``sys.platform``."""
    return ".dll" if system == "win32" else ".so"


SUFFIX = suffix(sys.platform)
_INCLUDE = re.compile(r'^#include "([^"]+)"', re.MULTILINE)


def read(path: Path) -> str:
    """The text of a source, whatever the system's encoding."""
    return path.read_text(encoding="utf-8")


def included(source: Path, root: Path = SOURCES, read: Callable[[Path], str] = read) -> list[Path]:
    """``source`` and the headers that it includes from ``root``, directly and indirectly."""
    found, pending = {source: None}, [source]  # a dictionary is ordered and fast to search
    while pending:
        for name in _INCLUDE.findall(read(pending.pop(0))):
            if (path := root / name) not in found:
                found[path] = None
                pending.append(path)
    return list(found)


class Sources:
    """The kernels below a folder: ``<op>/<kernel>.cpp`` and the headers that these include."""

    def __init__(self, root: Path = SOURCES) -> None:
        self.root = root

    def all(self) -> dict[str, Path]:
        """The source of each kernel by name."""
        return {path.stem: path for path in sorted(self.root.glob("*/*.cpp"))}

    def files(self, name: str) -> list[Path]:
        """The source of a kernel and its headers."""
        return included(self.all().get(name, self.root / f"{name}.cpp"), self.root)

    def calls_gemm(self, name: str) -> bool:
        """Whether a kernel calls the function of :data:`GEMM` for the same instruction set."""
        return self.root / GEMM / "call.h" in self.files(name)

    def reads_packed_weights(self, name: str) -> bool:
        """Whether a kernel reads weights that :data:`GEMM` packed for its vectors."""
        return name != GEMM and any(p.parent == self.root / GEMM for p in self.files(name))

    def stem(
        self, name: str, isa: str, machine: str | None = None, system: str | None = None
    ) -> str:
        """The start of a library's file name: kernel, instruction set and a digest.

        The digest covers sources, flags and platform, so outdated libraries are never loaded.

        Args:
            machine: the architecture; None for this one.
            system: as in ``sys.platform``; None for this one.
        """
        digest = hashlib.sha256()
        for path in sorted(self.files(name)):
            digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
        system, machine = system or instruction_sets.system(), machine or instruction_sets.machine()
        digest.update(repr([f"{system}-{machine}", instruction_sets.flags(isa)]).encode())
        return f"{name}-{isa}-{digest.hexdigest()[:16]}"

    def compile(
        self,
        built: Path,
        name: str,
        isa: str,
        compilers: Sequence[Sequence[str]],
        options: Sequence[str] = (),
    ) -> str:
        """Compile the library ``built`` with the first compiler that accepts it; return its path.

        Args:
            built: the output, in a folder that also holds the compiler's temporary files.
            compilers: of :func:`ops.cpu.build.compiler.find_compilers`.
            options: additional compiler options.

        Raises:
            RefusedError, CompilerError, OSError: see :func:`ops.cpu.build.compiler.run`.
        """
        flags = [*instruction_sets.flags(isa), *options, f"-I{self.root}", str(self.all()[name])]
        for number, words in enumerate(compilers, 1):
            try:
                compiler.run([*words, *flags, "-o", str(built)], built.parent)
            except compiler.RefusedError:
                if number == len(compilers):
                    raise
            else:
                return compiler.label(words)
        raise compiler.NoCompilerError("no compiler was given")
