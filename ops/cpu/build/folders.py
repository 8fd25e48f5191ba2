"""The folders of compiled libraries: where they are, who may write there, which files are intact.

A loaded library runs with all the user's rights. So, as ssh and sudo require of their files, every
folder on the path must belong to the user or root and be writable by nobody else. Sticky folders
such as ``/tmp`` may be world-writable, since nobody can move another user's files there. Windows
has access lists instead, which are not checked.

A library's name ends in the digest of its contents, so truncated or modified files are not loaded.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shlex
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from ops.cpu.build.sources import SUFFIX

fcntl: Any = None
with contextlib.suppress(ImportError):  # Windows
    import fcntl

_log = logging.getLogger(__name__)

_PERSISTENT = Path("/var/tmp")  # survives reboots and is writable by everyone
_SCRATCH_PREFIX = "building-"
_STALE_S = 3600.0  # longer than any compilation is allowed to take
_PATIENCE_S = 1200.0  # of waiting for another process that compiles


class Problem(NamedTuple):
    """What is wrong with a folder, and a shell command that fixes it ("" if there is none)."""

    reason: str
    fix: str = ""


# ---- folders -----------------------------------------------------------------------------------
def user_cache() -> Path:
    """The user's folder of compiled kernels; it may be missing or unusable."""
    # If the home directory is unknown, the "~" remains.
    chosen = os.environ.get("VISION_BACKBONES_CACHE_DIR")
    if chosen:
        return Path(os.path.expanduser(chosen)) / "native"
    if sys.platform == "darwin":
        base = "~/Library/Caches"
    elif sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or "~/AppData/Local"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.path.expanduser(base)) / "vision-backbones" / "native"


def candidates() -> list[Path]:
    """The user's cache, then the private folder that is used if the cache is not usable."""
    user = f"-{os.geteuid()}" if hasattr(os, "geteuid") else ""
    with contextlib.suppress(OSError):  # there may be no folder for temporary files
        base = _PERSISTENT if user and _PERSISTENT.is_dir() else Path(tempfile.gettempdir())
        return [user_cache(), base / f"vision-backbones{user}" / "native"]
    return [user_cache()]


def problem(folder: Path) -> Problem | None:
    """Why no library may be loaded from ``folder``, which need not exist; None if it is usable."""
    if folder.parts[0].startswith("~"):
        return Problem(f"there is no home for {str(folder)!r}")
    try:
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISDIR(folder.stat().st_mode):  # raises an error for a loop of links
                return Problem(f"{str(folder)!r} is not a folder")
        return _permission_problem(folder) if hasattr(os, "geteuid") else None
    except (OSError, ValueError) as error:
        return Problem(str(error))


def require_private(folder: Path) -> None:
    """Raise an OSError that says why ``folder`` is not usable, if it isn't."""
    if (found := problem(folder)) is not None:
        raise OSError(found.reason)


def _permission_problem(path: Path) -> Problem | None:
    """Why others can change the contents of ``path``; None if only the user and root can.

    Missing folders are not checked: they will belong to whoever creates them.
    """
    rest = list(reversed(path.absolute().parts))
    place = Path(rest.pop())
    while True:
        try:
            found = place.lstat()
        except FileNotFoundError:
            return None
        if found.st_uid not in (0, os.geteuid()):
            return Problem(f"{str(place)!r} belongs to another user ({found.st_uid})")
        if stat.S_ISLNK(found.st_mode):
            target = Path(os.readlink(place))
            rest += reversed(target.parts)
            place = Path(rest.pop()) if target.is_absolute() else place.parent
        elif found.st_mode & 0o022 and not (rest and found.st_mode & stat.S_ISVTX):
            return Problem(
                f"others may write to {str(place)!r} (mode {stat.S_IMODE(found.st_mode):o})",
                f"chmod go-w {shell_word(place)}" if found.st_uid == os.geteuid() else "",
            )
        if not rest:
            return None
        place /= rest.pop()


def shell_word(path: Path) -> str:
    """``path`` on one line, quoted for a shell; names that are not printable as in Python."""
    return shlex.quote(str(path)) if str(path).isprintable() else repr(str(path))


# ---- libraries ---------------------------------------------------------------------------------
def find(folder: Path, stem: str) -> Path | None:
    """The intact library ``stem`` in ``folder``; damaged ones are removed."""
    for path in sorted(folder.glob(f"{stem}-*{SUFFIX}")):
        with contextlib.suppress(OSError):
            if is_own_file(path) and path.stem.rpartition("-")[2] == _digest(path):
                return path
            path.unlink()
    return None


def is_own_file(path: Path) -> bool:
    """Whether ``path`` is a regular file of the user or root that nobody else can write to."""
    found = path.lstat()
    if not stat.S_ISREG(found.st_mode) or not hasattr(os, "geteuid"):
        return stat.S_ISREG(found.st_mode)
    return found.st_uid in (0, os.geteuid()) and not found.st_mode & 0o022


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:32]


def store(built: Path, folder: Path, stem: str) -> Path:
    """Move the library ``built`` from a scratch folder in ``folder`` to its final place."""
    path = folder / f"{stem}-{_digest(built)}{SUFFIX}"
    built.chmod(stat.S_IMODE(built.stat().st_mode) & ~0o022)  # whatever the umask is
    os.replace(built, path)
    return path


@contextlib.contextmanager
def scratch(folder: Path) -> Iterator[Path]:
    """A temporary folder in ``folder``."""
    made = Path(tempfile.mkdtemp(prefix=_SCRATCH_PREFIX, dir=folder))
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Create ``folder`` and let one process compile into it while the others wait.

    This only saves work: where files cannot be locked, or if the lock is held for very long, every
    process compiles and the last one wins. Scratch folders of processes that were killed, or
    interrupted more than once, are removed.

    Raises:
        OSError: the folder cannot be created, or not as a private one.
    """
    make(folder)
    require_private(folder)  # another user may have been faster
    with (folder / "lock").open("a") as file:
        alone = fcntl is not None and _wait_for(file, folder)
        _remove_scratch(folder, 0.0 if alone else _STALE_S)
        try:
            yield
        finally:  # closing is not enough if a process was forked in the meantime
            with contextlib.suppress(OSError, AttributeError):
                fcntl.flock(file, fcntl.LOCK_UN)


def _remove_scratch(folder: Path, age: float) -> None:
    """Remove scratch folders that are at least ``age`` seconds old."""
    for left in folder.glob(f"{_SCRATCH_PREFIX}*"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime >= age:
                shutil.rmtree(left)


def make(folder: Path) -> None:
    """Create ``folder`` and its missing parents, for this user only, whatever the umask is."""
    folder = Path(os.path.realpath(folder))  # a link may point to a folder that doesn't exist yet
    if not folder.is_dir():
        make(folder.parent)
        with contextlib.suppress(FileExistsError):
            folder.mkdir(0o700)


def _wait_for(file: IO[str], folder: Path) -> bool:
    """Whether this process now holds the lock."""
    begun, waits = time.monotonic(), False
    while time.monotonic() - begun < _PATIENCE_S:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if not waits:
                text = "Waiting for another process that compiles kernels into %r"
                _log.warning(text, str(folder))
            waits = True
            time.sleep(0.05)
        except OSError:  # no locks on this disk
            return False
    _log.warning("%r is still locked: going on without the lock", str(folder))
    return False
