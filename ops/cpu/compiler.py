"""Run the system's C++ compiler, or ziglang's; report why it failed, and clean up after it."""

from __future__ import annotations

import contextlib
import errno
import importlib.util
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
    "command",
    "find_compilers",
    "killing_on_error",
    "label",
    "run",
    "signals_delayed",
    "stopped",
    "unwinding_on_signals",
]

_log = logging.getLogger(__name__)

_TIMEOUT_S = 300
_ZIG_DRIVER = Path(__file__).with_name("zig.py")
# Messages of compilers, assemblers and linkers for failures not caused by the source or options.
_FULL = re.compile("No space left on device|Disk quota exceeded")
_KILLED = re.compile("signal terminated|terminated with signal|[Oo]ut of memory|allocate memory")
_LEAST_BYTES = (
    1 << 20
)  # a linker that maps its output is killed without a message if the disk is full
_SIGNALS = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
]


class RefusedError(Exception):
    """A compiler rejects a source or an option; the message is the compiler's."""


class CompilerError(Exception):
    """No source can be compiled here; the message says why."""


class NoCompilerError(CompilerError):
    """No compiler was found."""


def command() -> list[str]:
    """The words of ``CXX``.

    Raises:
        ValueError: unbalanced quotes.
    """
    chosen = os.environ.get("CXX", "")
    try:
        return shlex.split(chosen)
    except ValueError as error:
        raise ValueError(f"CXX={chosen!r} is not a command: {error}") from None


def find_compilers(chosen: Sequence[str]) -> list[list[str]]:
    """The commands to try, as argument lists; ``chosen`` comes first if it exists.

    Where there is no other, it is the clang in the package ``ziglang``, if that is installed.

    Raises:
        NoCompilerError: there is none.
    """
    found: list[list[str]] = []
    for words in (list(chosen), ["c++"], ["g++"], ["clang++"]):
        executable = shutil.which(words[0]) if words else None
        if executable and [executable, *words[1:]] not in found:
            found.append([executable, *words[1:]])
    found = found or _zig()
    if not found:
        text = "no C++ compiler found ($CXX, c++, g++, clang++ or the Python package ziglang)"
        raise NoCompilerError(text)
    return found


def _zig() -> list[list[str]]:
    package = importlib.util.find_spec("ziglang")
    if sys.platform != "linux" or not sys.executable or package is None or not package.origin:
        return []
    zig = shutil.which(str(Path(package.origin).with_name("zig")))
    return [[sys.executable, "-I", str(_ZIG_DRIVER), zig]] if zig else []


def label(words: Sequence[str]) -> str:
    """What to call the compiler that a command of :func:`find_compilers` runs."""
    return words[3] if str(_ZIG_DRIVER) in words else words[0]


def run(words: Sequence[str], scratch: Path) -> None:
    """Run a compiler and wait for it; its temporary files go to ``scratch``.

    Raises:
        RefusedError: it rejects the source or an option, or is not a compiler.
        CompilerError: it was killed or timed out.
        OSError: the disk is full, or ``scratch`` is not writable.
    """
    with contextlib.ExitStack() as stack:
        try:
            with signals_delayed():  # so that no started process goes unrecorded
                process = stack.enter_context(_start(words, scratch))
                stack.callback(_kill, process)
                stack.enter_context(_registered(process))
        except OSError as error:
            kind = CompilerError if error.errno in (errno.ENOMEM, errno.EAGAIN) else RefusedError
            raise kind(f"{label(words)}: {error.strerror}") from None
        try:
            stderr = process.communicate(timeout=_TIMEOUT_S)[1]
        except subprocess.TimeoutExpired:
            raise CompilerError(f"{label(words)} did not end within {_TIMEOUT_S} s") from None
    if process.returncode == 0:
        return
    _log.debug("%s\n%s", shlex.join(words), stderr)
    folder = scratch.parent
    if full := _FULL.search(stderr):
        raise OSError(errno.ENOSPC, full.group(), str(folder))
    if shutil.disk_usage(folder).free < _LEAST_BYTES:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
    (scratch / "probe").write_bytes(b"test")
    lines = [line for line in stderr.splitlines() if "error" in line.lower()]
    first = lines[0] if lines else stderr.strip()[:200]
    text = f"{label(words)} failed with status {process.returncode}: {first}"
    raise (
        CompilerError(text)
        if process.returncode < 0 or _KILLED.search(stderr)
        else RefusedError(text)
    )


def _start(words: Sequence[str], scratch: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        words,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",
        # Untranslated, since the messages are matched above.
        env={**os.environ, "LC_ALL": "C", "TMPDIR": str(scratch)},
        # A process group, as the compiler proper and the linker are grandchildren.
        start_new_session=True,
    )


def _kill(process: subprocess.Popen[str]) -> None:
    if process.returncode is not None:
        return
    if sys.platform == "win32":
        process.kill()
    else:
        os.killpg(process.pid, signal.SIGKILL)


# ---- several at a time -------------------------------------------------------------------------
stopped = threading.Event()  # set to end running compilers and start no more
_running: set[subprocess.Popen[str]] = set()
_running_lock = threading.Lock()


@contextlib.contextmanager
def _registered(process: subprocess.Popen[str]) -> Iterator[None]:
    """Context in which other threads can end ``process``."""
    with _running_lock:
        _running.add(process)
        if stopped.is_set():
            _kill(process)
    try:
        yield
    finally:
        with _running_lock:
            _running.remove(process)


@contextlib.contextmanager
def killing_on_error() -> Iterator[None]:
    """Context in which an error, such as a signal, ends the compilers of other threads."""
    stopped.clear()
    try:
        yield
    except BaseException:
        with _running_lock:
            stopped.set()
            for process in _running:
                _kill(process)
        raise


def _reset_after_fork() -> None:
    """After a fork: the compilers, and any thread that holds the lock, belong to the parent."""
    global _running_lock
    _running_lock = threading.Lock()
    _running.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset_after_fork)


# ---- signals -----------------------------------------------------------------------------------
class _Signal(BaseException):
    """A signal that would have ended this process."""


_waiting: list[BaseException] | None = None  # raised when the section that delays signals ends


@contextlib.contextmanager
def unwinding_on_signals() -> Iterator[None]:
    """Context in which a signal that ends this process unwinds the stack first.

    This works only in the main thread, a limitation of Python, and for signals that the program
    does not handle itself.
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
def signals_delayed() -> Iterator[None]:
    """Context that delays such signals until its end."""
    global _waiting
    if threading.current_thread() is not threading.main_thread():  # signals are handled elsewhere
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
