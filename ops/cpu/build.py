"""Find, compile on first use, and load C++ kernels."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ops.cpu import batch, cache, compiler, instruction_sets, libraries, openmp
from ops.cpu.cache import cache_dir
from ops.cpu.instruction_sets import instruction_set
from ops.cpu.libraries import sources
from ops.cpu.settings import SWITCH, is_switched_on

__all__ = [
    "Kernel",
    "cache_dir",
    "is_switched_on",
    "load",
    "prepare",
    "sources",
    "status",
    "unavailable_reason",
]

_log = logging.getLogger(__name__)

# Used by plain layers but few models, so these are not compiled along with all the others.
_OF_PLAIN_LAYERS = {"deformable", "neighborhood"}
# Used by readers of images, which need no other kernel.
_ALONE = {"resize"}


@dataclass(frozen=True)
class Kernel:
    """The state of a kernel in this process.

    Attributes:
        library: the loaded library, or ``None``.
        path: its file, or ``None``.
        instruction_set: the one it was compiled for; see :mod:`ops.cpu.instruction_sets`.
        reason: why there is no library, or ``None``.
    """

    library: ctypes.CDLL | None
    path: Path | None
    instruction_set: str
    reason: str | None


_kernels: dict[str, Kernel] = {}
_kernels_lock = threading.RLock()  # loading one kernel may load another
_logged: set[str] = set()  # messages that are logged once rather than per kernel


def load(name: str) -> ctypes.CDLL | None:
    """The library of the kernel ``name``, compiled if needed; ``None`` if it is unavailable.

    The outcome is cached for the life of the process.

    Raises:
        ValueError: no such kernel exists.
        SettingError: an environment variable has an invalid value.
    """
    return status(name).library


def unavailable_reason(name: str) -> str | None:
    """Why :func:`load` returns ``None``, or ``None`` if it returns a library."""
    return status(name).reason


def status(name: str) -> Kernel:
    """Build and load the kernel ``name`` on the first call; later calls return the same state."""
    kernel = _kernels.get(name)
    return _cached(name, _compiled_with(name)) if kernel is None else kernel


def prepare(isa: str) -> Path | None:
    """Compile all kernels for an instruction set, not necessarily this CPU's, without loading them.

    Returns:
        The folder that holds them; None if they came with the package.

    Raises:
        RuntimeError: they cannot be built; the message says why.
    """
    if not is_switched_on():
        raise RuntimeError(f"switched off by {SWITCH}={os.environ[SWITCH]}")
    stems = {name: libraries.stem(name, isa) for name in sources()}
    needed = [name for name in stems if libraries.shipped(stems[name]) is None]
    if not needed:
        return None
    problems = []
    for folder in cache.folders():
        if (problem := cache.problem(folder)) is None:
            try:
                missing = [name for name in needed if not cache.find(folder, stems[name])]
                if missing:
                    batch.compile_all(missing, isa, folder, _compilers())
                missing = [name for name in missing if not cache.find(folder, stems[name])]
            except (compiler.RefusedError, compiler.CompilerError) as error:
                raise RuntimeError(str(error)) from error
            except OSError as error:
                problem = cache.mark_unusable(folder, error)
            else:
                if missing:
                    raise RuntimeError(f"no {isa} kernel was built from {', '.join(missing)}")
                return folder
        problems.append(problem.reason)
    raise RuntimeError(f"no folder can hold them: {'; '.join(problems)}")


def _reset_after_fork() -> None:
    """After a fork: a lock held by a thread of the parent would never be released."""
    global _kernels_lock
    _kernels_lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset_after_fork)


class _UnavailableError(Exception):
    """A kernel is unavailable for every instruction set; the message says why."""


class _ForeignError(Exception):
    """The library cannot be loaded on this system; the message says why."""


def _cached(name: str, beside: Sequence[str]) -> Kernel:
    """The kernel; if it has to be compiled, so are those in ``beside``, likely needed soon."""
    with _kernels_lock:
        kernel = _kernels.get(name)
        if kernel is None:
            kernel = _kernels[name] = _find_or_build(name, beside)
        return kernel


def _find_or_build(name: str, beside: Sequence[str]) -> Kernel:
    known = sources()
    if known and name not in known:  # else the sources are missing
        raise ValueError(f"no kernel {name!r}; the kernels are {sorted(known)}")
    if not (known and libraries.reads_packed_weights(name)):
        return _find_or_build_alone(name, beside, instruction_sets.candidates())
    gemm = _cached(libraries.GEMM, beside)
    if gemm.library is None:
        return gemm
    # Weights are packed for gemm's vectors, so the instruction sets must match.
    kernel = _find_or_build_alone(name, beside, [gemm.instruction_set])
    if kernel.library is not None and libraries.calls_gemm(name):
        _link_gemm(kernel.library, gemm.library)
    return kernel


def _link_gemm(library: ctypes.CDLL, gemm: ctypes.CDLL) -> None:
    library.linear_use(ctypes.cast(gemm.linear_forward, ctypes.c_void_p))


def _find_or_build_alone(name: str, beside: Sequence[str], sets: list[str]) -> Kernel:
    """The kernel for the first of the instruction sets that is available."""
    reason, expected, may_build = "", False, True
    if not is_switched_on():
        reason, expected = f"switched off by {SWITCH}={os.environ[SWITCH]}", True
        sets.clear()
    for isa in sets:
        try:
            kernel = _find_or_build_for(name, isa, beside if may_build else None)
        except compiler.RefusedError as error:
            # An old compiler may not support a new CPU's instructions.
            reason = str(error)
        except (_UnavailableError, compiler.CompilerError, OSError) as error:
            # A plainer instruction set would not help, unless it is compiled already.
            reason, may_build = str(error), False
            expected = isinstance(error, compiler.NoCompilerError)
        else:
            if kernel is not None:
                return kernel
    _log.log(
        # A missing compiler or disabled kernels are no reason for a warning.
        logging.INFO if expected or not _is_first("failure") else logging.WARNING,
        "No compiled %s kernel, the pure torch path is used: %s",
        name,
        reason,
    )
    return Kernel(None, None, instruction_set(), reason)


def _find_or_build_for(name: str, isa: str, beside: Sequence[str] | None) -> Kernel | None:
    """The kernel from the package, else from the first folder that has it, else compiled into the
    first usable folder.

    Args:
        beside: see :func:`_cached`; None disables compilation.

    Raises:
        RefusedError: no compiler accepts the source for this instruction set.
        CompilerError, _UnavailableError, OSError: it is unavailable for every instruction set.
    """
    stem, may_build = libraries.stem(name, isa), beside is not None
    if (path := libraries.shipped(stem)) is not None:
        with contextlib.suppress(_ForeignError):
            return Kernel(_open(path), path, isa, None)
    foreign: set[Path] = set()
    problems: list[str] = []
    for folder in cache.folders(temporary=may_build):
        found, problem = None, cache.problem(folder)
        if problem is None:
            try:
                found = _load_cached(folder, stem, foreign)
                if found is None and beside is not None and not (problem := cache.failure(folder)):
                    found = _build(name, isa, folder, foreign, beside)
            except OSError as error:
                problem = cache.mark_unusable(folder, error)
        if found is not None:
            if problems and _is_first("cache"):
                text = "Compiled kernels are kept in %r, not in the cache: %s"
                _log.warning(text, str(folder), "; ".join(problems))
            return Kernel(*found, isa, None)
        if problem is not None and problem.reason not in problems:
            problems.append(problem.reason)
    if not may_build:
        return None
    raise _UnavailableError(f"no folder can hold it: {'; '.join(problems)}")


def _load_cached(folder: Path, stem: str, foreign: set[Path]) -> tuple[ctypes.CDLL, Path] | None:
    """An existing library; those that cannot be loaded here are added to ``foreign``."""
    for path in cache.find(folder, stem):
        if path not in foreign:
            try:
                return _open(path), path
            except _ForeignError:  # from another system that shares the folder
                foreign.add(path)
    return None


def _open(path: Path) -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        if cache.allows_execution(path):
            raise _ForeignError(str(error)) from None
        text = "The system lets no code run there"
        raise PermissionError(errno.EACCES, text, str(path.parent)) from None
    openmp.use_torch_threads(library)
    return library


def _build(
    name: str, isa: str, folder: Path, foreign: set[Path], beside: Sequence[str]
) -> tuple[ctypes.CDLL, Path]:
    """Compile the kernel and the missing ones of ``beside``."""
    compilers = _compilers()
    others = [other for other in beside if other != name and _is_missing(other, isa, folder)]
    needed = [name, *others]
    batch.compile_all(needed, isa, folder, compilers, foreign)
    if (found := _load_cached(folder, libraries.stem(name, isa), foreign)) is None:
        raise _UnavailableError(
            f"the library that {compiler.label(compilers[0])} built cannot be loaded"
        )
    return found


def _compiled_with(name: str) -> list[str]:
    """The kernels compiled along with ``name``: those of fused models, or those of plain layers."""
    if name in _ALONE:
        return [name]
    is_plain = name in _OF_PLAIN_LAYERS
    others = [n for n in sources() if n not in _ALONE]
    return [n for n in others if n == libraries.GEMM or (n in _OF_PLAIN_LAYERS) == is_plain]


def _is_missing(name: str, isa: str, folder: Path) -> bool:
    stem = libraries.stem(name, isa)
    return libraries.shipped(stem) is None and not cache.find(folder, stem)


def _compilers() -> list[list[str]]:
    """The commands to try, as argument lists."""
    try:
        chosen = compiler.command()
    except ValueError as error:
        chosen = []
        if _is_first("CXX"):
            _log.warning("%s; other compilers are tried", error)
    return compiler.find_compilers(chosen)


def _is_first(what: str) -> bool:
    """Whether this is the first call for ``what`` in this process."""
    if what in _logged:
        return False
    _logged.add(what)
    return True
