"""Crash-safe checkpoints: written atomically, with the previous one kept."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np
import safetensors.torch
import torch

from backbones.core.checkpoint_files import CheckpointError, read_file
from backbones.core.messages import first_line
from backbones.training.errors import CheckpointFileError

__all__ = [
    "FULL_DISK",
    "READING_ERRORS",
    "get_rng_state",
    "load_latest",
    "load_state",
    "previous_path",
    "save_state",
    "save_weights",
    "set_rng_state",
    "sync_folder",
    "validated_path",
    "write_atomically",
    "write_problem",
    "write_text_atomically",
]


FULL_DISK = {
    errno.ENOSPC: "no space is left in {}",
    errno.EDQUOT: "the disk quota is used up in {}",
    errno.EFBIG: "`ulimit -f` or the file system allows no file of this size in {}",
}
"""Texts on a folder by error number, where there may be no more or no larger files."""
READING_ERRORS = (
    *(AssertionError, AttributeError, EOFError, LookupError, MemoryError, OSError, OverflowError),
    *(RuntimeError, TypeError, ValueError, zipfile.BadZipFile, zlib.error, struct.error),
)
"""Exceptions of zipfile and torch for damaged or unrelated files."""


def previous_path(path: Path) -> Path:
    """The path of the previous checkpoint: ``last.pt`` → ``last.prev.pt``."""
    return path.with_suffix(f".prev{path.suffix}")


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Let ``write`` fill a temporary file and rename it to ``path`` after flushing it to disk.

    In any case, ``path`` is either the old file or the complete new one. Links are followed;
    devices and pipes (``/dev/stdout``) are written to directly.

    Raises:
        CheckpointFileError: the file cannot be written (disk full, no permission); ``path`` is
            unchanged.
    """
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.name}.tmp")
    try:
        if path.exists() and not path.is_file() and not path.is_dir():
            with open(path, "wb") as file:
                write(file)
            return
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
        sync_folder(target.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        # torch's writer wraps the OSError of a full disk in a RuntimeError.
        if not isinstance(error, (OSError, RuntimeError)):
            raise
        kept = "; the existing file is unchanged" if path.exists() else ""
        problem = write_problem(error, path.parent)
        raise CheckpointFileError(f"cannot write {path}: {problem}{kept}") from error


def write_text_atomically(path: Path, text: str) -> None:
    """:func:`write_atomically` for UTF-8; file names that aren't valid text are escaped."""
    data = text.encode(errors="backslashreplace")
    write_atomically(path, lambda file: file.write(data))


def validated_path(path: Path) -> Path:
    """The path of the last checkpoint that passed validation: ``last.validated.pt``.

    A hard link to ``path`` until that is replaced.
    """
    return path.with_suffix(f".validated{path.suffix}")


def save_state(path: Path, state: dict[str, Any], validated: bool = False) -> None:
    """Save ``state`` (tensors and plain Python values) as ``path``, the old file as ``.prev``.

    Args:
        validated: also link it as :func:`validated_path`, if the file system supports hard links.

    Raises:
        CheckpointFileError: see :func:`write_atomically`.
    """

    def write(file: IO[bytes]) -> None:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
        if path.exists():  # only now that the new file is complete
            try:
                _link(path, previous_path(path))
            except OSError:  # a file system without hard links
                os.replace(path, previous_path(path))

    write_atomically(path, write)
    if validated:
        with contextlib.suppress(OSError):
            _link(path, validated_path(path))


def save_weights(path: Path, weights: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Save only weights, as safetensors.

    Raises:
        CheckpointFileError: see :func:`write_atomically`.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    data = safetensors.torch.save(tensors, metadata)
    write_atomically(path, lambda file: file.write(data))


def load_state(path: Path) -> dict[str, Any]:
    """Read a file of :func:`save_state` onto the CPU, after verifying its checksums.

    Raises:
        CheckpointFileError: missing, truncated, corrupt, or not a training checkpoint.
    """
    try:
        state = read_file(path)
    except FileNotFoundError:
        raise CheckpointFileError(f"there is no checkpoint {path}") from None
    except (CheckpointError, OSError) as error:
        raise CheckpointFileError(str(error)) from error
    if not isinstance(state, dict) or "model" not in state:
        raise CheckpointFileError(f"{path} has no training state (no 'model' in it)")
    return state


def load_latest(path: Path) -> tuple[dict[str, Any], Path, str] | None:
    """The state of ``path``, or of the previous checkpoint if ``path`` is missing or damaged.

    Returns:
        State, its file, and a sentence on what was wrong ("" if nothing); None if neither file
        exists.

    Raises:
        CheckpointFileError: files exist, but none can be read.
    """
    candidates = [p for p in (path, previous_path(path)) if p.exists()]
    if not candidates:
        return None
    problems: list[str] = []
    for candidate in candidates:
        try:
            return load_state(candidate), candidate, "; ".join(problems)
        except CheckpointFileError as error:
            problems.append(str(error))
    raise CheckpointFileError("; ".join(problems))


def get_rng_state(cuda: bool = True) -> dict[str, Any]:
    """The states of Python's, NumPy's and torch's generators, in types allowed by weights_only."""
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (
            kind,
            torch.from_numpy(np.asarray(keys, dtype=np.int64)),
            position,
            has_gauss,
            cached,
        ),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if cuda and torch.cuda.is_initialized() else None,
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Restore the states of :func:`get_rng_state`."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def write_problem(error: BaseException, folder: Path) -> str:
    """Why a file in ``folder`` could not be written.

    torch's writer hides the error of a full disk behind one about positions in its archive.
    """
    cause: BaseException | None = error
    while cause is not None and not (isinstance(cause, OSError) and cause.strerror):
        cause = cause.__cause__ or cause.__context__
    if not isinstance(cause, OSError):
        return first_line(error)
    if cause.errno in FULL_DISK:
        return f"{FULL_DISK[cause.errno].format(folder)} ({cause.strerror})"
    return str(cause.strerror)


def _link(path: Path, other: Path) -> None:
    """Hard-link the file, so that ``path`` exists at every moment."""
    link = other.with_name(f".{other.name}.tmp")
    link.unlink(missing_ok=True)
    os.link(path, link)
    os.replace(link, other)
    link.unlink(missing_ok=True)  # which stays where both were the same file already


def sync_folder(folder: Path) -> None:
    """Make a rename durable; not available, and not needed, on Windows."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
