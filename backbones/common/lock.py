"""Locks of run folders, which the system releases when the holder dies."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import time
from pathlib import Path

LOCK_NAME = ".lock"
_BUSY = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)
_held: set[int] = set()


class LockedError(Exception):
    """Another process holds the lock; the message says which."""


class FolderLock:
    """An exclusive ``flock`` on the file :data:`LOCK_NAME` in a folder.

    The system releases it when the process ends, in whatever way; a remaining file has no meaning.
    Forked children, such as loader processes, do not hold it. If the system or file system does not
    support locks, ``problem`` says so.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOCK_NAME
        self.problem = ""
        self._descriptor: int | None = None
        try:
            import fcntl
        except ImportError:  # Windows
            self.problem = "this system has no flock"
            return
        while True:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                holder = _describe(self.path)
                os.close(descriptor)
                if error.errno in _BUSY:
                    raise LockedError(holder) from None
                self.problem = f"its file system does not lock ({error.strerror})"
                return
            if _is_at(descriptor, self.path):
                break
            os.close(descriptor)  # its last holder has just removed it
        _held.add(descriptor)
        self._descriptor = descriptor
        facts = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.time()}
        with contextlib.suppress(OSError):  # on a full disk it holds without a name
            os.ftruncate(descriptor, 0)
            os.write(descriptor, json.dumps(facts).encode())

    def release(self) -> None:
        """Release the lock and remove the file."""
        if self._descriptor is None:
            return
        with contextlib.suppress(OSError):
            self.path.unlink()
        _held.discard(self._descriptor)
        os.close(self._descriptor)
        self._descriptor = None


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _describe(path: Path) -> str:
    """The holder's description from its file."""
    try:
        facts = json.loads(path.read_text())
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(facts["since"]))
        return f"process {int(facts['pid'])} on {facts['host']} since {since}"
    except (OSError, ValueError, LookupError, TypeError, OverflowError):
        return "another process"


def _forget() -> None:
    while _held:
        os.close(_held.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
