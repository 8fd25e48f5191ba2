"""Where compiled libraries lie: which folders will do, and what is intact and safe to load there.

A library's name ends in the digest of its contents, so that one which was cut off or changed is
known before it is loaded, and libraries that several systems compile into a shared home lie side by
side. Everything is made beside its place and moved into it.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import hashlib
import logging
import mmap
import os
import shutil
import stat
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from ops.cpu.trust import Flaw, flaw_of, is_own_file

__all__ = [
    "cache_dir",
    "find",
    "flaw",
    "folders",
    "keep",
    "locked",
    "may_run",
    "refuse",
    "refused",
    "scratch",
]

_log = logging.getLogger(__name__)

_SUFFIX = ".dll" if sys.platform == "win32" else ".so"
# Where files outlive a restart of the machine, and everyone has room.
_LASTING = Path("/var/tmp")
_SCRATCH_PREFIX = "building-"
# Longer than any compilation may take.
_STALE_S = 3600.0
_LEAST_BYTES = 8 << 20  # for the assembler's files, mostly
# Some kernels take a quarter of that to compile on a busy machine.
_LOCK_PATIENCE_S = 120.0

_refused: dict[Path, Flaw] = {}  # where nothing can be written, as was found out
_temporary: list[Path] = []  # at most one: the folder of this process alone


# ---- folders -----------------------------------------------------------------------------------
def cache_dir() -> Path:
    """The folder that compiled kernels are to be kept in; it need not exist, nor will it always do.

    Where it will not, they lie in another; see :func:`folders`.
    """
    return next(folders())


def folders(temporary: bool = False) -> Iterator[Path]:
    """Where compiled libraries may lie, from the best place on.

    After the user's cache come private folders, for where that is missing or will not do.

    Args:
        temporary: at last, make one that is removed when this process ends; else it comes only if
            it has been made.
    """
    yield _user_cache()
    user = "" if sys.platform == "win32" else f"-{os.geteuid()}"
    if os.path.isdir(_LASTING):
        yield _LASTING / f"vision-backbones{user}" / "native"
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime and os.path.isdir(runtime):
        yield Path(runtime) / "vision-backbones" / "native"
    with contextlib.suppress(OSError):  # there may be no folder for temporary files
        yield Path(tempfile.gettempdir()) / f"vision-backbones{user}" / "native"
        if temporary and not _temporary:
            _temporary.append(Path(tempfile.mkdtemp(prefix="vision-backbones-")))
            atexit.register(_remove_temporary, os.getpid())
        yield from _temporary


def _user_cache() -> Path:
    # Where nobody knows the user's home, the "~" stays.
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


def _remove_temporary(pid: int) -> None:
    if os.getpid() == pid:  # not in a fork
        for folder in _temporary:
            shutil.rmtree(folder, ignore_errors=True)


def flaw(folder: Path) -> Flaw | None:
    """Why no library may be loaded from ``folder``, there already or not; None if it will do."""
    if folder.parts[0].startswith("~"):
        return Flaw(f"there is no home for {str(folder)!r}")
    try:
        if (found := flaw_of(folder)) is not None:
            return found
        there = folder
        while not there.exists():
            there = there.parent
        if not there.is_dir():
            return Flaw(f"{str(there)!r} is not a folder")
        if sys.platform == "linux" and os.statvfs(there).f_flag & os.ST_NOEXEC:
            return Flaw(f"the mount of {str(there)!r} allows no code to run (noexec)")
    except (OSError, ValueError) as error:
        return Flaw(_words(error))
    return None


def refuse(folder: Path, error: OSError) -> Flaw:
    """Compile nothing more into ``folder`` in this process, because of ``error``."""
    _refused[folder] = Flaw(_words(error))
    return _refused[folder]


def refused(folder: Path) -> Flaw | None:
    """Why nothing more is compiled into ``folder``; None if that was never tried in vain."""
    return _refused.get(folder)


def _words(error: OSError | ValueError) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {os.fsdecode(error.filename or '')!r}"
    return str(error)


# ---- libraries ---------------------------------------------------------------------------------
def find(folder: Path, stem: str) -> list[Path]:
    """The intact libraries ``stem`` in ``folder``; damaged ones are removed.

    Raises:
        OSError: the folder cannot be read.
    """
    try:
        names = sorted(os.listdir(folder))
    except FileNotFoundError:
        return []
    intact = []
    for name in names:
        if name.startswith(f"{stem}-") and name.endswith(_SUFFIX):
            path = folder / name
            if _is_intact(path):
                intact.append(path)
            else:
                with contextlib.suppress(OSError):
                    path.unlink()
    return intact


def _is_intact(path: Path) -> bool:
    try:
        return is_own_file(path) and path.stem.rpartition("-")[2] == _digest(path)
    except OSError:
        return False


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:32]


def keep(built: Path, folder: Path, stem: str) -> Path:
    """Move the library ``built``, which lies in a scratch folder of ``folder``, to its place."""
    path = folder / f"{stem}-{_digest(built)}{_SUFFIX}"
    built.chmod(stat.S_IMODE(built.stat().st_mode) & ~0o022)  # whatever the umask is
    os.replace(built, path)
    return path


def may_run(path: Path) -> bool:
    """Whether the system lets the code of the file ``path`` run, where it lies."""
    if sys.platform != "linux":
        return True
    try:
        with path.open("rb") as file:
            mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_EXEC).close()
    except PermissionError:
        return False
    return True


# ---- building ----------------------------------------------------------------------------------
@contextlib.contextmanager
def scratch(folder: Path) -> Iterator[Path]:
    """A folder in ``folder``, which is made if need be, that is gone afterwards.

    Those that killed processes left are removed, too.

    Raises:
        OSError: nothing can be written there.
    """
    # A link may lead to what is not there yet.
    _make(Path(os.path.realpath(folder)), 0o755 if folder == _user_cache() else 0o700)
    if (found := flaw_of(folder)) is not None:  # another user was faster
        raise OSError(found.reason)
    for left in folder.glob(f"{_SCRATCH_PREFIX}*"):
        if _is_stale(left):
            shutil.rmtree(left, ignore_errors=True)
    if shutil.disk_usage(folder).free < _LEAST_BYTES:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
    made = Path(tempfile.mkdtemp(prefix=_SCRATCH_PREFIX, dir=folder))
    try:
        with _held(made):
            yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Keep other processes from taking ``folder`` for one that was left, where locks exist."""
    if sys.platform == "win32":
        yield
        return
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _make(folder: Path, mode: int) -> None:
    """Make ``folder`` and those above it that are missing."""
    if not folder.is_dir():
        _make(folder.parent, mode)
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode)


def _is_stale(scratch_folder: Path) -> bool:
    """Whether it is old and nobody holds it; a lock outlives no process, on whatever machine."""
    try:
        if time.time() - scratch_folder.stat().st_mtime < _STALE_S:
            return False
        if sys.platform == "win32":
            return True
        import fcntl

        descriptor = os.open(scratch_folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        finally:
            os.close(descriptor)
    except BlockingIOError:
        return False
    except OSError:
        pass  # no locks there: its age must do
    return True


@contextlib.contextmanager
def locked(path: Path, stopped: threading.Event | None = None) -> Iterator[None]:
    """Let one process build while the others wait, for a while, or until ``stopped`` is set.

    Only saves work: where the file cannot be locked, or the process that holds it stands still,
    every process builds and the last one wins.
    """
    if sys.platform == "win32":
        yield
        return
    import fcntl

    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    except OSError:
        yield
        return
    try:
        if not _wait_for(file, path, stopped or threading.Event()):
            yield
            return
        try:
            with contextlib.suppress(OSError):  # a full disk
                os.ftruncate(file, 0)
                os.pwrite(file, f"{os.getpid()}\n".encode(), 0)
            yield
        finally:
            # Closing would not do: a process that was forked meanwhile has the file open, too.
            fcntl.flock(file, fcntl.LOCK_UN)
    finally:
        os.close(file)


def _wait_for(file: int, path: Path, stopped: threading.Event) -> bool:
    """Whether the lock could be had, within the time that one kernel takes to compile."""
    import fcntl

    start, told = time.monotonic(), False
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            waited = time.monotonic() - start
        except OSError:
            return False
        holder = os.pread(file, 20, 0).decode(errors="replace").strip() or "unknown"
        if waited >= _LOCK_PATIENCE_S:
            _log.warning(
                "Process %s has held %r for %.0f s: going on without it",
                holder,
                str(path),
                waited,
            )
            return False
        if not told:
            _log.info("Waiting for process %s, which holds %r", holder, str(path))
            told = True
        if stopped.wait(0.05):
            return False
