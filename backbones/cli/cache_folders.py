"""Cache folders, and the commands that select other ones."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ops import cpu
from ops.cpu import build
from ops.cpu.build.folders import Problem, shell_word

_KERNELS = "VISION_BACKBONES_CACHE_DIR"


def free_bytes(folder: Path) -> int | None:
    """Free bytes on the disk of an existing or new ``folder``; None if it cannot be written."""
    try:
        existing = next(p for p in (folder, *folder.parents) if p.exists())
        if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
            return None
        return shutil.disk_usage(existing).free
    except OSError:
        return None


def suggest_folder(variable: str, least: int) -> str:
    """The command that sets ``variable`` to a folder with more space; "" if there is none."""
    room = {}
    for candidate in _candidates():
        folder = Path(candidate) / "vision-backbones"
        if variable != _KERNELS or kernel_cache_problem(folder / "native") is None:
            room[folder] = free_bytes(folder) or 0
    most = max(room.values(), default=0)
    if most <= least:
        return ""
    return f"export {variable}={shell_word(next(f for f in room if room[f] == most))}"


def _candidates() -> Iterator[str]:
    home = os.path.expanduser("~")
    if home != "~":  # a home directory is known
        yield os.path.join(home, ".cache")
    for find in (os.getcwd, tempfile.gettempdir):
        with contextlib.suppress(OSError):  # the folder was removed, or there is none
            yield find()


def kernel_cache_problem(folder: Path) -> Problem | None:
    """Why compiled kernels cannot be cached in ``folder``; None if they can."""
    problem = build.process.problem(folder)
    if problem is None and free_bytes(folder) is None:
        return Problem(f"{shell_word(folder)} cannot be written")
    return problem


def kernel_cache_fix() -> str:
    """The command that makes the user's kernel cache usable; "" if there is none."""
    problem = kernel_cache_problem(cpu.cache_dir())
    return (problem.fix if problem else "") or suggest_folder(_KERNELS, 0)
