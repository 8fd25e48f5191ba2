"""The files from which a run resumes: written atomically, with the previous one kept."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import IO, Any

import torch

from backbones.common.checkpoint_files import CheckpointError, read_file
from backbones.common.errors import FileError
from backbones.common.files import write_atomically


def previous_path(path: Path) -> Path:
    """The path of the previous checkpoint: ``last.pt`` → ``last.prev.pt``."""
    return path.with_suffix(f".prev{path.suffix}")


def validated_path(path: Path) -> Path:
    """The path of the last checkpoint that passed validation: ``last.validated.pt``.

    A hard link to ``path`` until that is replaced.
    """
    return path.with_suffix(f".validated{path.suffix}")


def save_state(path: Path, state: dict[str, Any], validated: bool = False) -> None:
    """Save ``state`` (tensors and plain Python values) as ``path``, the old file as ``.prev``.

    Args:
        validated: also link it as :func:`validated_path`, if the file system supports hard links.
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


def load_state(path: Path) -> dict[str, Any]:
    """Read a file of :func:`save_state` onto the CPU, after verifying its checksums."""
    try:
        state = read_file(path)
    except FileNotFoundError:
        raise FileError(f"there is no checkpoint {path}") from None
    except (CheckpointError, OSError) as error:
        raise FileError(str(error)) from error
    if not isinstance(state, dict) or "model" not in state:
        raise FileError(f"{path} has no training state (no 'model' in it)")
    return state


def load_latest(path: Path) -> tuple[dict[str, Any], Path, str] | None:
    """The state of ``path``, or of the previous checkpoint if ``path`` is missing or damaged.

    Returns:
        State, its file, and a sentence on what was wrong ("" if nothing); None if neither file
        exists.
    """
    candidates = [p for p in (path, previous_path(path)) if p.exists()]
    if not candidates:
        return None
    problems: list[str] = []
    for candidate in candidates:
        try:
            return load_state(candidate), candidate, "; ".join(problems)
        except FileError as error:
            problems.append(str(error))
    raise FileError("; ".join(problems))


def _link(path: Path, other: Path) -> None:
    """Hard-link the file, so that ``path`` exists at every moment."""
    link = other.with_name(f".{other.name}.tmp")
    link.unlink(missing_ok=True)
    os.link(path, link)
    os.replace(link, other)
    link.unlink(missing_ok=True)  # which stays where both were the same file already
