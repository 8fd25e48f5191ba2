"""Compile several kernels in parallel, one per CPU."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Collection, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path

from ops.cpu import cache, compiler, libraries
from ops.cpu.progress import Progress
from ops.cpu.structures import included

__all__ = ["compile_all"]

_log = logging.getLogger(__name__)

_SHOW_S = 0.2
# The size of a source with its headers that compiles almost instantly.
_QUICK_BYTES = 22_000

_compiler_failure: str | None = None  # why compilers are no longer tried
_refused: dict[str, str] = {}  # libraries that no compiler could build, and why


def compile_all(
    names: Sequence[str],
    isa: str,
    folder: Path,
    compilers: Sequence[Sequence[str]],
    foreign: Collection[Path] = (),
) -> None:
    """Compile kernels into ``folder``, waiting for those that another process is compiling.

    Args:
        names: the first is required; failures of the others are ignored.
        compilers: the result of :func:`ops.cpu.compiler.find_compilers`.
        foreign: existing libraries that were built on another system.

    Raises:
        RefusedError: no compiler accepts the first kernel for this instruction set.
        CompilerError, OSError: it cannot be built for any instruction set.
    """
    stems = {name: libraries.stem(name, isa) for name in names}
    if (reason := _refused.get(stems[names[0]])) is not None:
        raise compiler.RefusedError(reason)
    weights = {name: _weight(name) for name in names if stems[name] not in _refused}
    # Longest first, so that all threads finish at about the same time.
    order = sorted(weights, key=lambda name: -weights[name])
    running: list[str] = []

    def compile_one(name: str) -> None:
        if compiler.stopped.is_set():
            return
        running.append(name)
        try:
            _compile(name, isa, folder, stems[name], compilers, foreign)
        except compiler.RefusedError as error:
            _refused[stems[name]] = str(error)
            raise
        finally:
            running.remove(name)

    with (
        compiler.unwinding_on_signals(),
        Progress(weights, isa, folder) as progress,
        ThreadPoolExecutor(_cpus(), "compiling") as pool,
        compiler.killing_on_error(),
    ):
        with compiler.signals_delayed():  # so that no started thread goes unrecorded
            futures = {name: pool.submit(compile_one, name) for name in order}
        pending: set[Future[None]] = set(futures.values())
        while pending:
            _, pending = wait(pending, _SHOW_S, FIRST_COMPLETED)
            progress.show([n for n, future in futures.items() if future.done()], list(running))
    futures[names[0]].result()


def _weight(name: str) -> float:
    """The approximate compile time, in arbitrary units."""
    files = included(libraries.sources()[name], libraries.SOURCES)
    return max(1, sum(path.stat().st_size for path in files) - _QUICK_BYTES)


def _cpus() -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1


def _compile(
    name: str,
    isa: str,
    folder: Path,
    stem: str,
    compilers: Sequence[Sequence[str]],
    foreign: Collection[Path],
) -> None:
    """Compile into a scratch folder and move the library into place atomically."""
    global _compiler_failure
    with (
        cache.scratch(folder) as scratch,
        cache.locked(folder / f"{stem}.lock", compiler.stopped),
    ):
        # Another process may have built it in the meantime.
        if set(cache.find(folder, stem)).difference(foreign):
            return
        if _compiler_failure is not None:
            raise compiler.CompilerError(_compiler_failure)
        start, built = time.perf_counter(), scratch / name
        try:
            used = libraries.compile_into(built, name, isa, compilers)
        except compiler.CompilerError as error:
            if not compiler.stopped.is_set():
                _compiler_failure = str(error)
            raise
        path = cache.store(built, folder, stem)
    _log.info(
        "Compiled the %s kernel for %s in %.1f s with %s, kept in %r",
        *(name, isa, time.perf_counter() - start, used, str(path)),
    )
