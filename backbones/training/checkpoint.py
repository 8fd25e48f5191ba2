"""Checkpoints that survive: written beside, flushed, renamed; the one before is kept."""

from __future__ import annotations

import contextlib
import os
import pickle
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np
import safetensors.torch
import torch

from backbones.training.errors import CheckpointFileError

__all__ = [
    "get_rng_state",
    "load_latest",
    "load_state",
    "previous_path",
    "save_state",
    "save_weights",
    "set_rng_state",
    "write_atomically",
]


def previous_path(path: Path) -> Path:
    """Where the checkpoint before ``path`` is kept: ``last.pt`` → ``last.prev.pt``."""
    return path.with_suffix(f".prev{path.suffix}")


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Let ``write`` fill a temporary file and move it to ``path`` once it is safely on disk.

    Whatever happens, ``path`` is the old file or the whole new one.

    Raises:
        CheckpointFileError: the file cannot be written (disk full, no permission); ``path`` is
            untouched then.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        # torch's own writer wraps the OSError of a full disk in a RuntimeError.
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        kept = "; the file that was there is untouched" if path.exists() else ""
        raise CheckpointFileError(f"cannot write {path}: {error}{kept}") from error


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Save ``state`` (tensors and plain Python values) as ``path``, the old file as ``.prev``.

    Raises:
        CheckpointFileError: see :func:`write_atomically`.
    """

    def write(file: IO[bytes]) -> None:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
        if path.exists():  # only now that the new file is complete
            _keep(path, previous_path(path))

    write_atomically(path, write)


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
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise CheckpointFileError(f"{path} is corrupt: wrong checksum of {damaged}")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointFileError(f"there is no checkpoint {path}") from None
    except (zipfile.BadZipFile, EOFError, OSError, RuntimeError, pickle.UnpicklingError) as error:
        if isinstance(error, CheckpointFileError):
            raise
        raise CheckpointFileError(f"{path} is no complete checkpoint: {error}") from error
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


def _keep(path: Path, previous: Path) -> None:
    """Give the file a second name, so that ``path`` is there at every moment."""
    link = previous.with_name(f".{previous.name}.tmp")
    with contextlib.suppress(FileNotFoundError):
        link.unlink()
    try:
        os.link(path, link)
        os.replace(link, previous)
    except OSError:  # a file system without hard links
        os.replace(path, previous)


def _sync_folder(folder: Path) -> None:
    """Make a rename durable. Windows has no such call, and renames durably by itself."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
