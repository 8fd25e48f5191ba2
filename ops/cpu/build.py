"""Compile each C++ kernel once, on first use, and load it."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import logging
import os
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from ops.cpu import cache, compiler, instruction_sets
from ops.cpu.cache import cache_dir
from ops.cpu.instruction_sets import instruction_set
from ops.cpu.structures import included

__all__ = [
    "Kernel",
    "cache_dir",
    "is_switched_on",
    "load",
    "sources",
    "status",
    "unavailable_reason",
]

_log = logging.getLogger(__name__)

_SOURCES = Path(__file__).parent
_SWITCH = "VISION_BACKBONES_NATIVE"
_YES, _NO = ("1", "true", "yes", "on"), ("0", "false", "no", "off")


@dataclass(frozen=True)
class Kernel:
    """What became of one kernel in this process.

    Attributes:
        library: the loaded library, or ``None``.
        path: its file, or ``None``.
        instruction_set: what it was compiled for; see :mod:`ops.cpu.instruction_sets`.
        reason: why there is no library, in words; ``None`` where there is one.
    """

    library: ctypes.CDLL | None
    path: Path | None
    instruction_set: str
    reason: str | None


_kernels: dict[str, Kernel] = {}
_kernels_lock = threading.Lock()
_given_up: str | None = None  # why the compiler is not tried again
_told: set[str] = set()  # what has been said, and is not said for every kernel


def load(name: str) -> ctypes.CDLL | None:
    """The library of the kernel ``name``, compiled if need be; ``None`` if it cannot be had.

    The outcome is remembered for the life of the process.

    Raises:
        ValueError: if no such kernel exists.
    """
    return status(name).library


def unavailable_reason(name: str) -> str | None:
    """Why :func:`load` gives ``None``, in words; ``None`` where it gives a library."""
    return status(name).reason


def status(name: str) -> Kernel:
    """Build and load the kernel ``name`` on the first call; later calls repeat the outcome."""
    kernel = _kernels.get(name)
    if kernel is None:
        with _kernels_lock:
            kernel = _kernels.get(name)
            if kernel is None:
                kernel = _kernels[name] = _find_or_build(name)
    return kernel


def is_switched_on() -> bool:
    """Whether the environment lets kernels be compiled and loaded.

    Raises:
        ValueError: if ``VISION_BACKBONES_NATIVE`` says neither yes nor no.
    """
    chosen = os.environ.get(_SWITCH, "")
    word = chosen.strip().lower()
    if word not in ("", *_YES, *_NO):
        raise ValueError(f"{_SWITCH} must be one of {[*_YES, *_NO]}, got {chosen!r}")
    return word not in _NO


def _start_anew() -> None:
    """In a fork: whoever holds the lock is a thread of the parent, and not here."""
    global _kernels_lock
    _kernels_lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_anew)


class _UnavailableError(Exception):
    """Why a kernel cannot be had, whatever the instructions."""


class _ForeignError(Exception):
    """The library cannot be loaded on this system: why."""


def _find_or_build(name: str) -> Kernel:
    known = sources()
    if known and name not in known:  # else the sources are missing
        raise ValueError(f"no kernel {name!r}; the kernels are {sorted(known)}")
    sets = instruction_sets.candidates()
    reason, expected, may_build = "", False, True
    if not is_switched_on():
        reason, expected = f"switched off by {_SWITCH}={os.environ[_SWITCH]}", True
        sets.clear()
    for isa in sets:
        try:
            kernel = _find_or_build_for(name, isa, may_build)
        except compiler.RefusedError as error:
            # An old compiler may not know the instructions of a new CPU.
            reason = str(error)
        except (_UnavailableError, compiler.CompilerError, OSError) as error:
            # Fewer instructions would not help; a library that was compiled for them would.
            reason, may_build = str(error), False
            expected = isinstance(error, compiler.NoCompilerError)
        else:
            if kernel is not None:
                return kernel
    _log.log(
        # To have no compiler, or to want no kernels, is nothing out of the ordinary.
        logging.INFO if expected or not _is_news("failure") else logging.WARNING,
        "No compiled %s kernel, the pure torch path is used: %s",
        name,
        reason,
    )
    return Kernel(None, None, instruction_set(), reason)


def _find_or_build_for(name: str, isa: str, may_build: bool) -> Kernel | None:
    """The kernel from the first folder that has it, else compiled into the first that will do.

    Raises:
        RefusedError: the compilers do not take the source with these instructions.
        CompilerError, _UnavailableError, OSError: it cannot be had, whatever the instructions.
    """
    stem = f"{name}-{isa}-{_key(name, isa)}"
    foreign: set[Path] = set()
    flaws: list[str] = []
    for folder in cache.folders(temporary=may_build):
        found, flaw = None, cache.flaw(folder)
        if flaw is None:
            try:
                found = _load_kept(folder, stem, foreign)
                if found is None and may_build and (flaw := cache.refused(folder)) is None:
                    found = _build(name, isa, folder, stem, foreign)
            except OSError as error:
                flaw = cache.refuse(folder, error)
        if found is not None:
            if flaws and _is_news("flaws"):
                text = "Compiled kernels are kept in %r, not in the cache: %s"
                _log.warning(text, str(folder), "; ".join(flaws))
            return Kernel(*found, isa, None)
        if flaw is not None and flaw.reason not in flaws:
            flaws.append(flaw.reason)
    if not may_build:
        return None
    raise _UnavailableError(f"it can be kept nowhere: {'; '.join(flaws)}")


def sources() -> dict[str, Path]:
    """The source of each kernel, ``<folder>/<name>.cpp``, by its name."""
    return {path.stem: path for path in sorted(_SOURCES.glob("*/*.cpp"))}


def _key(name: str, isa: str) -> str:
    """What the library depends on, so that no other's is ever loaded: sources, flags, platform."""
    digest = hashlib.sha256()
    source = sources().get(name, _SOURCES / f"{name}.cpp")
    for path in sorted(included(source, _SOURCES)):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    platform_name = f"{sys.platform}-{instruction_sets.machine()}"
    flags = instruction_sets.COMMON_FLAGS, instruction_sets.FLAGS[isa]
    digest.update(repr([platform_name, *flags, instruction_sets.THREADING_FLAGS]).encode())
    return digest.hexdigest()[:16]


def _load_kept(folder: Path, stem: str, foreign: set[Path]) -> tuple[ctypes.CDLL, Path] | None:
    """A library that is there already; those that do not load here are added to ``foreign``."""
    for path in cache.find(folder, stem):
        if path not in foreign:
            try:
                return _open(path), path
            except _ForeignError:  # of another system that shares the folder
                foreign.add(path)
    return None


def _open(path: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        if cache.may_run(path):
            raise _ForeignError(str(error)) from None
        text = "The system lets no code run there"
        raise PermissionError(errno.EACCES, text, str(path.parent)) from None


def _build(
    name: str, isa: str, folder: Path, stem: str, foreign: set[Path]
) -> tuple[ctypes.CDLL, Path]:
    """Compile into a scratch folder and move it into place, so that no one ever sees half of it."""
    compilers = _compilers()
    with (
        compiler.cleaning_up(),
        cache.scratch(folder) as scratch,
        cache.locked(folder / f"{stem}.lock"),
    ):
        # Another process may have built it while this one waited.
        if (found := _load_kept(folder, stem, foreign)) is not None:
            return found
        start, built = time.perf_counter(), scratch / name
        how = _compile(compilers, name, isa, built)
        path = cache.keep(built, folder, stem)
    _log.info(
        "Compiled the %s kernel for %s in %.1f s with %s, kept in %r",
        name,
        isa,
        time.perf_counter() - start,
        how,
        str(path),
    )
    try:
        return _open(path), path
    except _ForeignError as error:
        raise _UnavailableError(str(error)) from None


def _compilers() -> list[list[str]]:
    """The commands to try, as argument lists."""
    try:
        chosen = compiler.command()
    except ValueError as error:
        chosen = []
        if _is_news("CXX"):
            _log.warning("%s; other compilers are tried", error)
    return compiler.find_compilers(chosen)


def _compile(compilers: list[list[str]], name: str, isa: str, built: Path) -> str:
    """Make the library ``built`` with the first compiler that takes it; in words, with which."""
    global _given_up
    if _given_up is not None:
        raise compiler.CompilerError(_given_up)
    said = ""
    for words in compilers:
        for threading_flags in instruction_sets.THREADING_FLAGS:
            flags = [*instruction_sets.flags(isa), *threading_flags]
            source = [f"-I{_SOURCES}", str(sources()[name])]
            try:
                compiler.run([*words, *flags, *source, "-o", str(built)], built.parent)
            except compiler.RefusedError as error:
                said = str(error)
            except compiler.CompilerError as error:
                _given_up = str(error)
                raise
            else:
                return words[0] if threading_flags else f"{words[0]} without OpenMP"
    raise compiler.RefusedError(said)


def _is_news(what: str) -> bool:
    """Whether it is the first time in this process."""
    if what in _told:
        return False
    _told.add(what)
    return True
