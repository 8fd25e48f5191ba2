"""The folders of compiled libraries: which are usable, and which files are safe to load.

A library's name ends in the digest of its contents, so truncated or modified files are detected
before they are loaded, and several systems can compile into a shared home directory. Files are
written to a scratch folder and then moved into place.
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

from ops.cpu.trust import Problem, is_own_file, permission_problem

__all__ = [
    "allows_execution",
    "cache_dir",
    "failure",
    "find",
    "folders",
    "locked",
    "mark_unusable",
    "problem",
    "scratch",
    "store",
]

_log = logging.getLogger(__name__)

_SUFFIX = ".dll" if sys.platform == "win32" else ".so"
# Survives reboots and is writable by everyone.
_PERSISTENT = Path("/var/tmp")
_SCRATCH_PREFIX = "building-"
# Longer than any compilation is allowed to take.
_STALE_S = 3600.0
_LEAST_BYTES = 8 << 20  # mostly for the assembler's files
# Some kernels take a quarter of this to compile on a busy machine.
_LOCK_PATIENCE_S = 120.0

_refused: dict[Path, Problem] = {}  # folders where writing has failed
_temporary: list[Path] = []  # at most one: this process's own folder


# ---- folders -----------------------------------------------------------------------------------
def cache_dir() -> Path:
    """The preferred folder of compiled kernels; it may be missing or unusable.

    If it is unusable, another one of :func:`folders` is used.
    """
    return next(folders())


def folders(temporary: bool = False) -> Iterator[Path]:
    """The folders that may hold compiled libraries, in order of preference.

    After the user's cache come private folders, used if the cache is missing or unusable.

    Args:
        temporary: finally create one that is removed when this process ends; by default it is
            included only if it exists already.
    """
    yield _user_cache()
    user = "" if sys.platform == "win32" else f"-{os.geteuid()}"
    if os.path.isdir(_PERSISTENT):
        yield _PERSISTENT / f"vision-backbones{user}" / "native"
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime and os.path.isdir(runtime):
        yield Path(runtime) / "vision-backbones" / "native"
    with contextlib.suppress(OSError):  # there may be no temporary directory
        yield Path(tempfile.gettempdir()) / f"vision-backbones{user}" / "native"
        if temporary and not _temporary:
            _temporary.append(Path(tempfile.mkdtemp(prefix="vision-backbones-")))
            atexit.register(_remove_temporary, os.getpid())
        yield from _temporary


def _user_cache() -> Path:
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


def _remove_temporary(pid: int) -> None:
    if os.getpid() == pid:  # not in a fork
        for folder in _temporary:
            shutil.rmtree(folder, ignore_errors=True)


def problem(folder: Path) -> Problem | None:
    """Why no library may be loaded from ``folder``, which need not exist; None if it is usable."""
    if folder.parts[0].startswith("~"):
        return Problem(f"there is no home for {str(folder)!r}")
    try:
        if (found := permission_problem(folder)) is not None:
            return found
        existing = folder
        while not existing.exists():
            existing = existing.parent
        if not existing.is_dir():
            return Problem(f"{str(existing)!r} is not a folder")
        if sys.platform == "linux" and os.statvfs(existing).f_flag & os.ST_NOEXEC:
            return Problem(f"the mount of {str(existing)!r} allows no code to run (noexec)")
    except (OSError, ValueError) as error:
        return Problem(_message(error))
    return None


def mark_unusable(folder: Path, error: OSError) -> Problem:
    """Stop compiling into ``folder`` in this process because of ``error``."""
    _refused[folder] = Problem(_message(error))
    return _refused[folder]


def failure(folder: Path) -> Problem | None:
    """Why nothing more is compiled into ``folder``; None if no attempt has failed."""
    return _refused.get(folder)


def _message(error: OSError | ValueError) -> str:
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


def store(built: Path, folder: Path, stem: str) -> Path:
    """Move the library ``built`` from a scratch folder in ``folder`` to its final place."""
    path = folder / f"{stem}-{_digest(built)}{_SUFFIX}"
    built.chmod(stat.S_IMODE(built.stat().st_mode) & ~0o022)  # whatever the umask is
    os.replace(built, path)
    return path


def allows_execution(path: Path) -> bool:
    """Whether the system allows code to be loaded from ``path`` (not mounted noexec)."""
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
    """A temporary folder in ``folder``, which is created if needed.

    Leftovers of killed processes are removed, too.

    Raises:
        OSError: nothing can be written there.
    """
    # A link may point to a folder that doesn't exist yet.
    _make(Path(os.path.realpath(folder)), 0o755 if folder == _user_cache() else 0o700)
    if (found := permission_problem(folder)) is not None:  # another user was faster
        raise OSError(found.reason)
    for left in folder.glob(f"{_SCRATCH_PREFIX}*"):
        if _is_stale(left):
            shutil.rmtree(left, ignore_errors=True)
    if shutil.disk_usage(folder).free < _LEAST_BYTES:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
    made = Path(tempfile.mkdtemp(prefix=_SCRATCH_PREFIX, dir=folder))
    try:
        with _locked_folder(made):
            yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


@contextlib.contextmanager
def _locked_folder(folder: Path) -> Iterator[None]:
    """Lock ``folder``, where locks exist, so that other processes don't consider it a leftover."""
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
    """Create ``folder`` and its missing parents."""
    if not folder.is_dir():
        _make(folder.parent, mode)
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode)


def _is_stale(scratch_folder: Path) -> bool:
    """Whether it is old and unlocked; locks end with their process, on any machine."""
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
        pass  # no locks there: go by age alone
    return True


@contextlib.contextmanager
def locked(path: Path, stopped: threading.Event | None = None) -> Iterator[None]:
    """Let one process build while the others wait, up to a timeout or until ``stopped`` is set.

    This only saves work: if the file cannot be locked or its holder hangs, every process builds
    and the last one wins.
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
            # Closing is not enough: a process forked in the meantime has the file open, too.
            fcntl.flock(file, fcntl.LOCK_UN)
    finally:
        os.close(file)


def _wait_for(file: int, path: Path, stopped: threading.Event) -> bool:
    """Whether the lock was acquired within the time allowed for compiling one kernel."""
    import fcntl

    start, logged = time.monotonic(), False
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
        if not logged:
            _log.info("Waiting for process %s, which holds %r", holder, str(path))
            logged = True
        if stopped.wait(0.05):
            return False
