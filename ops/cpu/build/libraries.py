"""Find, compile on first use, and load the kernels' libraries."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from ops.cpu import instruction_sets
from ops.cpu.build import compiler, folders, openmp
from ops.cpu.build.compiler import CompilerError, NoCompilerError, RefusedError
from ops.cpu.build.sources import GEMM, SOURCES, SUFFIX, Sources
from ops.cpu.instruction_sets import SWITCH, is_switched_on

_log = logging.getLogger(__name__)

# In wheels. Libraries in the package are as trustworthy as its Python code.
SHIPPED = SOURCES / "compiled"
# Used by plain layers but few models, so these are not compiled along with all the others.
_OF_PLAIN_LAYERS = {"deformable", "neighborhood"}
# Used by readers of images, which need no other kernel.
_ALONE = {"resize"}
T = TypeVar("T")


@dataclass(frozen=True)
class LibraryState:
    """The state of a kernel's library in this process.

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


class Libraries:
    """The libraries of a process, and all that is remembered about them.

    Args:
        sources: of the kernels.
        shipped: the folder of those that came with the package.
    """

    def __init__(self, sources: Sources | None = None, shipped: Path = SHIPPED) -> None:
        self.sources, self.shipped = sources or Sources(), shipped
        self.states: dict[str, LibraryState] = {}
        self._unusable: dict[Path, str] = {}  # folders that nothing more is compiled into, and why
        self._refused: dict[str, str] = {}  # libraries that no compiler could build, and why
        self._compiler_problem = ""  # why compilers are no longer tried
        self._said: set[str] = set()  # what is logged once rather than per kernel
        self.forget_threads()

    def forget_threads(self) -> None:
        """After a fork: a thread that holds the lock belongs to the parent."""
        self._lock = threading.RLock()  # loading one kernel may load another

    def status(self, name: str) -> LibraryState:
        """See :func:`ops.cpu.build.status`."""
        return self._status(name, self.compiled_with(name))

    def prepare(self, isa: str) -> Path | None:
        """Compile all kernels for an instruction set, maybe another CPU's, without loading them.

        Returns:
            The folder that holds them; None if they came with the package.

        Raises:
            RuntimeError: they cannot be built; the message says why.
        """
        if not is_switched_on():
            raise RuntimeError(_switched_off())
        needed = [name for name in self.sources.all() if self._shipped(name, isa) is None]

        def compile_in(folder: Path) -> Path:
            self._compile(needed, isa, folder)
            if missing := self._missing(needed, isa, folder):
                raise CompilerError(f"no {isa} kernel was built from {', '.join(missing)}")
            return folder

        try:
            return self._in_first_folder(compile_in) if needed else None
        except (RefusedError, CompilerError, OSError) as error:
            raise RuntimeError(str(error)) from error

    def problem(self, folder: Path) -> folders.Problem | None:
        """Why nothing is compiled into ``folder``; None if it is, as far as is known."""
        if folder in self._unusable:
            return folders.Problem(self._unusable[folder])
        return folders.problem(folder)

    # ---- finding -------------------------------------------------------------------------------
    def compiled_with(self, name: str) -> list[str]:
        """The kernels compiled along with this one: all of fused models, or of plain layers."""
        if name in _ALONE:
            return [name]
        is_plain = name in _OF_PLAIN_LAYERS
        others = [n for n in self.sources.all() if n not in _ALONE]
        return [n for n in others if n == GEMM or (n in _OF_PLAIN_LAYERS) == is_plain]

    def _status(self, name: str, beside: Sequence[str]) -> LibraryState:
        """The state; if the library has to be compiled, those in ``beside`` are, too."""
        with self._lock:
            if name not in self.states:
                self.states[name] = self._find(name, beside)
            return self.states[name]

    def _find(self, name: str, beside: Sequence[str]) -> LibraryState:
        known = self.sources.all()
        if known and name not in known:  # else the sources are missing
            raise ValueError(f"no kernel {name!r}; the kernels are {sorted(known)}")
        sets, gemm = instruction_sets.candidates(), None
        if not is_switched_on():
            return self._unavailable(name, _switched_off(), logging.INFO)
        if known and self.sources.reads_packed_weights(name):
            gemm = self._status(GEMM, beside)
            if gemm.library is None:
                return gemm
            sets = [gemm.instruction_set]  # weights are packed for gemm's vectors
        reason, level = "", logging.WARNING
        for isa in sets:
            try:
                found = self._find_for(name, isa, beside)
            except RefusedError as error:
                reason = str(error)  # an old compiler may not support a new CPU's instructions
            except (CompilerError, OSError) as error:  # a plainer set would not help
                level = logging.INFO if isinstance(error, NoCompilerError) else level
                return self._unavailable(name, str(error), level)
            else:
                if gemm is not None and self.sources.calls_gemm(name):
                    self.link_gemm(found.library, gemm.library)
                return found
        return self._unavailable(name, reason, level)

    def _unavailable(self, name: str, reason: str, level: int) -> LibraryState:
        text = "No compiled %s kernel, the pure torch path is used: %s"
        _log.log(level if self._is_first("failure") else logging.INFO, text, name, reason)
        return LibraryState(None, None, instruction_sets.instruction_set(), reason)

    def _find_for(self, name: str, isa: str, beside: Sequence[str]) -> LibraryState:
        """The library from the package, else from the first usable folder, else compiled.

        Raises:
            RefusedError: no compiler accepts the source for this instruction set.
            CompilerError, OSError: it is unavailable for every instruction set.
        """
        if (path := self._shipped(name, isa)) is not None:
            with contextlib.suppress(OSError):  # of another system
                return LibraryState(self.open(path), path, isa, None)
        stem = self.sources.stem(name, isa)

        def find_in(folder: Path) -> LibraryState:
            if (path := folders.find(folder, stem)) is None:
                others = [other for other in beside if self._shipped(other, isa) is None]
                self._compile([name, *others], isa, folder)
                path = folders.find(folder, stem)
            if path is None:
                raise OSError(f"{stem} is gone from {str(folder)!r}")
            return LibraryState(self.open(path), path, isa, None)

        return self._in_first_folder(find_in)

    def _in_first_folder(self, use: Callable[[Path], T]) -> T:
        """The result of ``use`` for the first folder that is usable; OSError if none is."""
        problems: list[str] = []
        for folder in folders.candidates():
            try:
                folders.require_private(folder)
                result = use(folder)
            except OSError as error:
                place = f": {os.fsdecode(error.filename)!r}" if error.filename else ""
                self._unusable[folder] = f"{error.strerror or error}{place}"
                problems.append(self._unusable[folder])
            else:
                if problems and self._is_first("cache"):
                    text = "Compiled kernels are kept in %r, not in the cache: %s"
                    _log.warning(text, str(folder), "; ".join(problems))
                return result
        raise OSError(f"no folder can be used: {'; '.join(problems)}")

    def _shipped(self, name: str, isa: str) -> Path | None:
        """The library that came with the package, if it was built from the package's sources."""
        path = self.shipped / f"{self.sources.stem(name, isa)}{SUFFIX}"
        return path if path.is_file() else None

    def open(self, path: Path) -> ctypes.CDLL:
        """Load a library; OSError if it is another system's, or the folder's mount is noexec."""
        library = ctypes.CDLL(str(path))
        openmp.use_torch_threads(library)
        return library

    def link_gemm(self, caller: ctypes.CDLL | None, gemm: ctypes.CDLL | None) -> None:
        """Let a kernel call the one of linear layers."""
        assert caller is not None and gemm is not None
        caller.linear_use(ctypes.cast(gemm.linear_forward, ctypes.c_void_p))

    def _is_first(self, what: str) -> bool:
        is_first = what not in self._said
        self._said.add(what)
        return is_first

    # ---- compiling -----------------------------------------------------------------------------
    def _missing(self, names: Sequence[str], isa: str, folder: Path) -> list[str]:
        stems = {name: self.sources.stem(name, isa) for name in names}
        return [name for name, stem in stems.items() if folders.find(folder, stem) is None]

    def _compile(self, names: Sequence[str], isa: str, folder: Path) -> None:
        """Compile the missing kernels among ``names`` into ``folder``.

        Raises:
            RefusedError: no compiler accepts the first one for this instruction set.
            CompilerError: nothing can be compiled.
            OSError: the folder cannot be written to, or could not before.
        """
        if folder in self._unusable:
            raise OSError(self._unusable[folder])
        first = self.sources.stem(names[0], isa)
        if first not in self._refused and self._missing(names, isa, folder):
            if self._compiler_problem:
                raise CompilerError(self._compiler_problem)
            compilers = compiler.find_compilers(compiler.command())
            with folders.locked(folder):
                self._compile_all(self._missing(names, isa, folder), isa, folder, compilers)
        if first in self._refused:
            raise RefusedError(self._refused[first])

    def _compile_all(
        self, names: Sequence[str], isa: str, folder: Path, compilers: list[list[str]]
    ) -> None:
        """Compile kernels, one per CPU at a time, and show the progress on a terminal."""
        if not names:  # another process has compiled them in the meantime
            return
        _log.warning(
            "Compiling %d C++ kernels for %s, which the package does not contain, into %r. This "
            "happens once; in advance: vision-backbones build, never: VISION_BACKBONES_NATIVE=0",
            *(len(names), isa, str(folder)),
        )
        # Longest first, so that all threads finish at about the same time.
        sizes = {n: sum(p.stat().st_size for p in self.sources.files(n)) for n in names}
        order = sorted(names, key=lambda name: -sizes[name])
        # After an error or Ctrl-C, which a terminal sends to compilers, too, no more are started.
        with ThreadPoolExecutor(cores()) as pool:
            run = partial(self._compile_one, isa=isa, folder=folder, compilers=compilers)
            try:
                for number, _ in enumerate(pool.map(run, order), 1):
                    _show(number, len(names))
            except CompilerError as error:
                self._compiler_problem = str(error)
                raise

    def _compile_one(self, name: str, isa: str, folder: Path, compilers: list[list[str]]) -> None:
        """Compile into a scratch folder and move the library into place atomically."""
        if (stem := self.sources.stem(name, isa)) in self._refused:
            return
        start = time.perf_counter()
        try:
            with folders.scratch(folder) as scratch:
                built = scratch / name
                used = self.sources.compile(built, name, isa, compilers)
                path = folders.store(built, folder, stem)
        except RefusedError as error:
            self._refused[stem] = str(error)
        else:
            took = time.perf_counter() - start
            text = "Compiled the %s kernel for %s in %.1f s with %s, kept in %r"
            _log.info(text, name, isa, took, used, str(path))


def _switched_off() -> str:
    return f"switched off by {SWITCH}={os.environ[SWITCH]}"


def cores() -> int:
    """The number of cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1


def _show(done: int, count: int) -> None:
    """Draw a progress bar on standard error, if that is a terminal."""
    if sys.stderr is not None and sys.stderr.isatty():
        bar = "#" * (24 * done // count)
        sys.stderr.write(f"\r[{bar:.<24}] {done}/{count}" + "\n" * (done == count))
        sys.stderr.flush()
