"""Checkpoints that survive: written beside, flushed, renamed; the one before is kept."""

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
]


FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What the system says of a full disk, a used-up quota, a file that may not grow."""
READING_ERRORS = (
    *(AssertionError, AttributeError, EOFError, LookupError, MemoryError, OSError, OverflowError),
    *(RuntimeError, TypeError, ValueError, zipfile.BadZipFile, zlib.error, struct.error),
)
"""What zipfile and torch raise of files that are damaged or something else."""


def previous_path(path: Path) -> Path:
    """Where the checkpoint before ``path`` is kept: ``last.pt`` → ``last.prev.pt``."""
    return path.with_suffix(f".prev{path.suffix}")


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Let ``write`` fill a temporary file and move it to ``path`` once it is safely on disk.

    Whatever happens, ``path`` is the old file or the whole new one. Of a link that is the file it
    leads to, and devices and pipes (``/dev/stdout``) are written to as they are.

    Raises:
        CheckpointFileError: the file cannot be written (disk full, no permission); ``path`` is
            untouched then.
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
        # torch's own writer wraps the OSError of a full disk in a RuntimeError.
        if not isinstance(error, (OSError, RuntimeError)):
            raise
        kept = "; the file that was there is untouched" if path.exists() else ""
        problem = write_problem(error, path.parent)
        raise CheckpointFileError(f"cannot write {path}: {problem}{kept}") from error


def validated_path(path: Path) -> Path:
    """Where the last checkpoint is kept that a validation found good: ``last.validated.pt``.

    The same file as ``path``, under a second name, until that is replaced.
    """
    return path.with_suffix(f".validated{path.suffix}")


def save_state(path: Path, state: dict[str, Any], validated: bool = False) -> None:
    """Save ``state`` (tensors and plain Python values) as ``path``, the old file as ``.prev``.

    Args:
        validated: keep it as :func:`validated_path` too, where the file system has hard links.

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
    """Save weights alone, as safetensors.

    Raises:
        CheckpointFileError: see :func:`write_atomically`.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    data = safetensors.torch.save(tensors, metadata)
    write_atomically(path, lambda file: file.write(data))


def load_state(path: Path) -> dict[str, Any]:
    """Read what :func:`save_state` wrote, onto the CPU, after checking every byte's checksum.

    Raises:
        CheckpointFileError: missing, truncated, corrupt, or no checkpoint of ours.
    """
    try:
        state = read_file(path)
    except FileNotFoundError:
        raise CheckpointFileError(f"there is no checkpoint {path}") from None
    except (CheckpointError, OSError) as error:
        raise CheckpointFileError(str(error)) from error
    if not isinstance(state, dict) or "model" not in state:
        raise CheckpointFileError(f"{path} holds no training state (no 'model' in it)")
    return state


def load_latest(path: Path) -> tuple[dict[str, Any], Path, str] | None:
    """The state of ``path``, or of the one before it if ``path`` is missing or damaged.

    Returns:
        State, the file that it came from, and a sentence on what was wrong ("" if nothing);
        None if there is neither file.

    Raises:
        CheckpointFileError: there are files, and none can be read.
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
    """The state of Python's, NumPy's and torch's generators, in types that weights_only allows."""
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
    """Put back what :func:`get_rng_state` returned."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def write_problem(error: BaseException, folder: Path) -> str:
    """Why a file in ``folder`` could not be written, in the words of the system.

    torch's own writer hides the error of a full disk behind one about positions in its archive.
    """
    cause: BaseException | None = error
    while cause is not None and not (isinstance(cause, OSError) and cause.strerror):
        cause = cause.__cause__ or cause.__context__
    if not isinstance(cause, OSError):
        return first_line(error)
    if cause.errno in FULL_DISK:
        return f"no space is left in {folder} ({cause.strerror})"
    return str(cause.strerror)


def _link(path: Path, other: Path) -> None:
    """Give the file a second name, so that ``path`` is there at every moment."""
    link = other.with_name(f".{other.name}.tmp")
    link.unlink(missing_ok=True)
    os.link(path, link)
    os.replace(link, other)
    link.unlink(missing_ok=True)  # which stays where both were the same file already


def sync_folder(folder: Path) -> None:
    """Make a rename durable. Windows has no such call, and renames durably by itself."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
