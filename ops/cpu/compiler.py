"""Run the system's C++ compiler, tell why it failed, and leave nothing of it behind."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

__all__ = [
    "CompilerError",
    "NoCompilerError",
    "RefusedError",
    "cleaning_up",
    "command",
    "ending_all",
    "find_compilers",
    "run",
    "stopped",
]

_log = logging.getLogger(__name__)

_TIMEOUT_S = 300
# What compilers, assemblers and linkers say where neither the source nor the options are at fault.
_FULL = re.compile("No space left on device|Disk quota exceeded")
_ENDED = re.compile("signal terminated|terminated with signal|[Oo]ut of memory|allocate memory")
_LEAST_BYTES = 1 << 20  # a linker that maps its output is ended by a full disk, and says nothing
_SIGNALS = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
]


class RefusedError(Exception):
    """A compiler does not take a source or an option: what it says."""


class CompilerError(Exception):
    """No source can be compiled here: why."""


class NoCompilerError(CompilerError):
    """There is none."""


def command() -> list[str]:
    """The words of ``CXX``.

    Raises:
        ValueError: quotes that do not end.
    """
    chosen = os.environ.get("CXX", "")
    try:
        return shlex.split(chosen)
    except ValueError as error:
        raise ValueError(f"CXX={chosen!r} is no command: {error}") from None


def find_compilers(chosen: Sequence[str]) -> list[list[str]]:
    """The commands to try, as argument lists, ``chosen`` first if it is there.

    Raises:
        NoCompilerError: there is none.
    """
    found: list[list[str]] = []
    for words in (list(chosen), ["c++"], ["g++"], ["clang++"]):
        executable = shutil.which(words[0]) if words else None
        if executable and [executable, *words[1:]] not in found:
            found.append([executable, *words[1:]])
    if not found:
        raise NoCompilerError("no C++ compiler found ($CXX, c++, g++ or clang++)")
    return found


def run(words: Sequence[str], scratch: Path) -> None:
    """Run a compiler to its end; its own temporary files lie in ``scratch``, too.

    Raises:
        RefusedError: it does not take the source or an option, or is no compiler.
        CompilerError: it was ended, or does not end.
        OSError: the disk is full, or nothing else can be written to ``scratch`` either.
    """
    with contextlib.ExitStack() as stack:
        try:
            with _undisturbed():
                process = stack.enter_context(_start(words, scratch))
                stack.callback(_end, process)
                stack.enter_context(_listed(process))
        except OSError as error:
            kind = CompilerError if error.errno in (errno.ENOMEM, errno.EAGAIN) else RefusedError
            raise kind(f"{words[0]}: {error.strerror}") from None
        try:
            said = process.communicate(timeout=_TIMEOUT_S)[1]
        except subprocess.TimeoutExpired:
            raise CompilerError(f"{words[0]} did not end within {_TIMEOUT_S} s") from None
    if process.returncode == 0:
        return
    _log.debug("%s\n%s", shlex.join(words), said)
    folder = scratch.parent
    if full := _FULL.search(said):
        raise OSError(errno.ENOSPC, full.group(), str(folder))
    if shutil.disk_usage(folder).free < _LEAST_BYTES:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
    (scratch / "probe").write_bytes(b"may anything be written there?")
    lines = [line for line in said.splitlines() if "error" in line.lower()]
    first = lines[0] if lines else said.strip()[:200]
    text = f"{words[0]} failed with status {process.returncode}: {first}"
    raise (
        CompilerError(text) if process.returncode < 0 or _ENDED.search(said) else RefusedError(text)
    )


def _start(words: Sequence[str], scratch: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        words,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",
        # Without translations, which are not known here.
        env={**os.environ, "LC_ALL": "C", "TMPDIR": str(scratch)},
        # The compiler proper and the linker are children of its children.
        start_new_session=True,
    )


def _end(process: subprocess.Popen[str]) -> None:
    if process.returncode is not None:
        return
    if sys.platform == "win32":
        process.kill()
    else:
        os.killpg(process.pid, signal.SIGKILL)


# ---- several at a time -------------------------------------------------------------------------
stopped = threading.Event()  # compilers are ended rather than begun
_running: set[subprocess.Popen[str]] = set()
_running_lock = threading.Lock()


@contextlib.contextmanager
def _listed(process: subprocess.Popen[str]) -> Iterator[None]:
    """Inside, ``process`` can be ended by another thread."""
    with _running_lock:
        _running.add(process)
        if stopped.is_set():
            _end(process)
    try:
        yield
    finally:
        with _running_lock:
            _running.remove(process)


@contextlib.contextmanager
def ending_all() -> Iterator[None]:
    """An error inside, such as a signal, ends the compilers that other threads run."""
    stopped.clear()
    try:
        yield
    except BaseException:
        with _running_lock:
            stopped.set()
            for process in _running:
                _end(process)
        raise


def _start_anew() -> None:
    """In a fork: the compilers are the parent's, and so is the thread that may hold the lock."""
    global _running_lock
    _running_lock = threading.Lock()
    _running.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_anew)


# ---- signals -----------------------------------------------------------------------------------
class _Signal(BaseException):
    """A signal that was to end this process."""


_waiting: list[BaseException] | None = None  # what is raised once nothing is to be disturbed


@contextlib.contextmanager
def cleaning_up() -> Iterator[None]:
    """Inside, a signal that ends this process lets what is open be closed first.

    Only in the main thread, as Python has it, and where the program does not handle the signal.
    """
    before: dict[int, Any] = {}

    def unwind(number: int, frame: FrameType | None) -> None:
        by_user = before[number] is signal.default_int_handler
        error = KeyboardInterrupt() if by_user else _Signal(number)
        if _waiting is None:
            raise error
        _waiting.append(error)

    try:
        with contextlib.suppress(ValueError):  # another thread
            for number in _SIGNALS:
                if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                    before[number] = signal.getsignal(number)
                    signal.signal(number, unwind)
        yield
    except _Signal as caught:
        signal.signal(caught.args[0], signal.SIG_DFL)
        os.kill(os.getpid(), caught.args[0])
        raise
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) is unwind:
                signal.signal(number, handler)


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Inside, such a signal waits: a process that was started must be known to whoever ends it."""
    global _waiting
    if threading.current_thread() is not threading.main_thread():  # where no signal is handled
        yield
        return
    waiting: list[BaseException] = []
    _waiting = waiting
    try:
        yield
    finally:
        _waiting = None
    if waiting:
        raise waiting[0]
