"""Files that are whole or not there: whatever ends the command, what is half-written goes."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from backbones.cli.common import CommandError

__all__ = ["check_place", "replace_whole", "tidy_on_signals"]

# What asks a command to end and Python does not turn into an exception of its own.
_SIGNALS = ("SIGTERM", "SIGHUP")
_FULL = {
    errno.ENOSPC: "no space left on the disk",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file is larger than the file system or a limit (ulimit -f) allows",
}


def check_place(path: Path) -> None:
    """Find out early that a file cannot be written.

    Raises:
        CommandError: there is no such folder, or ``path`` is one, or a device.
    """
    if path.is_dir():
        raise CommandError(f"{path} is a folder; give the file to write, such as {path / 'x.onnx'}")
    if path.exists() and not path.is_file():
        raise CommandError(f"{path} is no file that could be replaced")
    if not path.parent.is_dir():
        raise CommandError(f"there is no folder {path.parent} to write {path.name} to")


@contextlib.contextmanager
def replace_whole(path: Path) -> Iterator[Path]:
    """Where to write: a file of the same name, moved to ``path`` if the block succeeds.

    What is written beside it, under a longer name, moves along. What else is left goes.

    Raises:
        CommandError: ``path`` cannot be written, or not wholly; it is as before then.
    """
    check_place(path)
    scratch = path.parent / f".export-{secrets.token_hex(4)}"
    try:
        scratch.mkdir()
        yield scratch / path.name
        for written in sorted(scratch.glob(f"{path.name}?*")):  # the data first, then the graph
            os.replace(written, path.with_name(written.name))
        os.replace(scratch / path.name, path)
    except Exception as error:
        if reason := _why_unwritten(error):
            raise CommandError(f"cannot write {path}: {reason}") from error
        raise
    finally:
        try:
            shutil.rmtree(scratch, ignore_errors=True)
        except BaseException:  # a signal, which may come here too
            shutil.rmtree(scratch, ignore_errors=True)
            raise


def _why_unwritten(error: BaseException) -> str | None:
    """What the disk refused, or None if ``error`` is of something else.

    Libraries wrap the error of a full disk in errors of their own.
    """
    if isinstance(error, OSError) and error.errno not in _FULL:
        return error.strerror or str(error)
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in _FULL:
            return _FULL[seen.errno]
        seen = seen.__cause__ or seen.__context__
    return None


@contextlib.contextmanager
def tidy_on_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP leave the block as Ctrl-C does, through every ``finally``.

    Raises:
        SystemExit: 128 and the signal's number, as a shell says it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # Python lets only the main thread handle signals
        return

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    numbers = [getattr(signal, name) for name in _SIGNALS if hasattr(signal, name)]
    before = {number: signal.signal(number, leave) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
