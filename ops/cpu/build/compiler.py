"""Run the system's C++ compiler, or ziglang's, and say why it failed."""

from __future__ import annotations

import errno
import importlib.util
import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from ops.cpu import instruction_sets

_log = logging.getLogger(__name__)

_TIMEOUT_S = 900  # zig may first compile its C++ library
_ZIG_DRIVER = Path(__file__).with_name("zig.py")
# Messages of compilers, assemblers and linkers for failures not caused by the source or options.
_FULL = re.compile("No space left on device|Disk quota exceeded")
_KILLED = re.compile("signal terminated|terminated with signal|[Oo]ut of memory|allocate memory")


class RefusedError(Exception):
    """A compiler rejects a source or an option; the message is the compiler's."""


class CompilerError(Exception):
    """No source can be compiled here; the message says why."""


class NoCompilerError(CompilerError):
    """No compiler was found."""


def command() -> list[str]:
    """The words of ``CXX``; CompilerError if its quotes are unbalanced."""
    chosen = os.environ.get("CXX", "")
    try:
        return shlex.split(chosen)
    except ValueError as error:
        raise CompilerError(f"CXX={chosen!r} is not a command: {error}") from None


def find_compilers(chosen: Sequence[str]) -> list[list[str]]:
    """The commands to try: ``chosen`` first if it exists; ziglang's clang if there is no other."""
    found: list[list[str]] = []
    # On Windows, GCC misaligns vectors on the stack, and Visual Studio's clang has other options.
    usual = [] if sys.platform == "win32" else [["c++"], ["g++"], ["clang++"]]
    for words in (list(chosen), *usual):
        executable = shutil.which(words[0]) if words else None
        if executable and [executable, *words[1:]] not in found:
            found.append([executable, *words[1:]])
    found = found or zig()
    if not found:
        text = "no C++ compiler found ($CXX, c++, g++, clang++ or the Python package ziglang)"
        raise NoCompilerError(text)
    return found


def zig(target: str | None = None) -> list[list[str]]:
    """The command of ziglang's clang, if that is installed.

    Args:
        target: one of zig's, such as ``"x86_64-windows-gnu"``; default: this system.
    """
    package = importlib.util.find_spec("ziglang")
    if not sys.executable or package is None or not package.origin:
        return []
    program = "zig.exe" if sys.platform == "win32" else "zig"
    found = shutil.which(str(Path(package.origin).with_name(program)))
    # By default, zig compiles for this CPU and the newest glibc that it knows; torch needs 2.28.
    systems = {"linux": "linux-gnu.2.28", "win32": "windows-gnu", "darwin": "macos"}
    if found is None or sys.platform not in systems:
        return []
    target = target or f"{instruction_sets.machine()}-{systems[sys.platform]}"
    return [[sys.executable, "-I", str(_ZIG_DRIVER), found, target]]


def label(words: Sequence[str]) -> str:
    """The name, for messages, of the compiler in a command of :func:`find_compilers`."""
    return words[3] if str(_ZIG_DRIVER) in words else words[0]


def run(words: Sequence[str], scratch: Path) -> None:
    """Run a compiler and wait for it; its temporary files go to ``scratch``.

    Raises:
        RefusedError: it rejects the source or an option, or is not a compiler.
        CompilerError: it was killed or timed out.
        OSError: the disk is full.
    """
    # Untranslated, since the messages are matched below.
    environment = {**os.environ, "LC_ALL": "C", "TMPDIR": str(scratch)}
    try:
        done = subprocess.run(
            words,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="replace",
            env=environment,
            timeout=_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        raise CompilerError(f"{label(words)} did not end within {_TIMEOUT_S} s") from None
    except OSError as error:
        raise RefusedError(f"{label(words)}: {error.strerror}") from None
    if done.returncode == 0:
        return
    _log.debug("%s\n%s", shlex.join(words), done.stderr)
    if full := _FULL.search(done.stderr):
        raise OSError(errno.ENOSPC, full.group(), str(scratch.parent))
    lines = [line for line in done.stderr.splitlines() if "error" in line.lower()]
    first = lines[0] if lines else done.stderr.strip()[:200]
    killed = done.returncode < 0 or _KILLED.search(done.stderr)
    kind = CompilerError if killed else RefusedError
    raise kind(f"{label(words)} failed with status {done.returncode}: {first}")
