"""Files: written under a temporary name and renamed; errors in words."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import safetensors.torch
import torch

from backbones.common.errors import FileError
from backbones.common.messages import first_line

# Where there may be no more or no larger files.
_FULL_DISK = {
    errno.ENOSPC: "no space is left in {}",
    errno.EDQUOT: "the disk quota is used up in {}",
    errno.EFBIG: "`ulimit -f` or the file system allows no file of this size in {}",
}


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Let ``write`` fill a temporary file and rename it to ``path`` after flushing it to disk.

    In any case, ``path`` is either the old file or the complete new one. Links are followed;
    devices and pipes (``/dev/stdout``) are written to directly.
    """
    with writing(path):
        if path.exists() and not path.is_file() and not path.is_dir():
            with open(path, "wb") as file:
                write(file)
            return
        with replacing(path) as temporary, open(temporary, "wb") as file:
            write(file)


def write_text_atomically(path: Path, text: str) -> None:
    """:func:`write_atomically` for UTF-8; file names that aren't valid text are escaped."""
    data = text.encode(errors="backslashreplace")
    write_atomically(path, lambda file: file.write(data))


def save_weights(path: Path, weights: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Save only weights, as safetensors."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    data = safetensors.torch.save(tensors, metadata)
    write_atomically(path, lambda file: file.write(data))


@contextlib.contextmanager
def replacing(path: Path, unique: bool = False) -> Iterator[Path]:
    """A temporary path next to ``path``; at the end, it is flushed to disk and renamed.

    If the block raises, the temporary file is removed and ``path`` is unchanged. Links are
    followed. ``unique`` names are for processes that write the same file.
    """
    target = Path(os.path.realpath(path))
    number = f".{secrets.token_hex(4)}" if unique else ""
    temporary = target.with_name(f".{target.name}{number}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
        sync_folder(target.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def replacing_together(path: Path) -> Iterator[Path]:
    """A temporary path with the same name, for libraries that write further files next to it.

    Files whose names extend that of ``path`` are moved along; any others are deleted. If it fails,
    ``path`` is unchanged.
    """
    scratch = path.parent / f".export-{secrets.token_hex(4)}"
    try:
        with writing(path):
            scratch.mkdir()
            yield scratch / path.name
            for written in sorted(scratch.glob(f"{path.name}?*")):  # the data first
                os.replace(written, path.with_name(written.name))
            os.replace(scratch / path.name, path)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise the failures of the block to write ``path`` as a :class:`FileError`."""
    try:
        yield
    except Exception as error:
        if _io_cause(error) is None:
            raise
        kept = "; the existing file is unchanged" if path.exists() else ""
        problem = write_problem(error, path.parent)
        raise FileError(f"cannot write {path}: {problem}{kept}") from error


def write_problem(error: BaseException, folder: Path) -> str:
    """Why a file in ``folder`` could not be written."""
    cause = _io_cause(error)
    if cause is None or not cause.strerror:
        return first_line(error)
    if cause.errno in _FULL_DISK:
        return f"{_FULL_DISK[cause.errno].format(folder)} ({cause.strerror})"
    return str(cause.strerror)


def _io_cause(error: BaseException) -> OSError | None:
    """The OSError behind ``error``; None if it has another cause.

    Libraries wrap the error of a full disk in their own: torch's writer in a RuntimeError about
    positions in its archive.
    """
    causes: list[OSError] = []
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError):
            causes.append(seen)
        seen = seen.__cause__ or seen.__context__
    if full := [cause for cause in causes if cause.errno in _FULL_DISK]:
        return full[0]
    return causes[0] if causes and isinstance(error, (OSError, RuntimeError)) else None


def sync_folder(folder: Path) -> None:
    """Make a rename durable; not available, and not needed, on Windows."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_problem(file: str | Path) -> str | None:
    """Why ``file`` is not a readable regular file; None if it is one.

    Opening a named pipe would block, and a device may never end.
    """
    try:
        mode = os.stat(file).st_mode
    except FileNotFoundError:
        return "is a broken link" if os.path.islink(file) else "does not exist"
    except (OSError, ValueError) as error:
        return f"cannot be accessed: {getattr(error, 'strerror', None) or error}"
    if stat.S_ISREG(mode):
        return None
    return f"is {_KINDS.get(stat.S_IFMT(mode), 'no file')}"


_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
