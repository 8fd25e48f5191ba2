"""Atomic file output: whatever ends the command, partial files are removed."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from backbones.cli.common import CommandError
from backbones.training.checkpoint import FULL_DISK
from backbones.training.interrupt import handle_signals

__all__ = ["exit_on_signals", "replace_atomically"]

# Termination signals that Python doesn't turn into exceptions by default.
_SIGNALS = ("SIGTERM", "SIGHUP")


@contextlib.contextmanager
def replace_atomically(path: Path) -> Iterator[Path]:
    """Yields a temporary path of the same name, which is moved to ``path`` if the block succeeds.

    Files whose names extend the temporary file's are moved along; any others are deleted.

    Raises:
        CommandError: ``path`` could not be written completely and is unchanged.
    """
    scratch = path.parent / f".export-{secrets.token_hex(4)}"
    try:
        scratch.mkdir()
        yield scratch / path.name
        for written in sorted(scratch.glob(f"{path.name}?*")):  # the data first, then the graph
            os.replace(written, path.with_name(written.name))
        os.replace(scratch / path.name, path)
    except Exception as error:
        if reason := _io_problem(error, path.parent):
            raise CommandError(f"cannot write {path}: {reason}") from error
        raise
    finally:
        try:
            shutil.rmtree(scratch, ignore_errors=True)
        except BaseException:  # a signal, which may come here too
            shutil.rmtree(scratch, ignore_errors=True)
            raise


def _io_problem(error: BaseException, folder: Path) -> str | None:
    """The I/O problem behind ``error`` in ``folder``, or None if it has another cause.

    Libraries wrap the error of a full disk in their own.
    """
    if isinstance(error, OSError) and error.errno not in FULL_DISK:
        return error.strerror or str(error)
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in FULL_DISK:
            return FULL_DISK[seen.errno].format(folder)
        seen = seen.__cause__ or seen.__context__
    return None


@contextlib.contextmanager
def exit_on_signals() -> Iterator[None]:
    """Make SIGTERM and SIGHUP raise an exception, so that every ``finally`` runs.

    Raises:
        SystemExit: status 128 + signal, as in a shell.
    """

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    with handle_signals(_SIGNALS, leave):
        yield
