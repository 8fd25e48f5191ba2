"""Cache folders, and the commands that select other ones."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ops import cpu
from ops.cpu import cache
from ops.cpu.trust import Flaw, shell_word

__all__ = ["elsewhere", "free_bytes", "kernel_flaw", "mend_kernel_cache"]

_KERNELS = "VISION_BACKBONES_CACHE_DIR"


def free_bytes(folder: Path) -> int | None:
    """Free bytes on the disk of an existing or new ``folder``; None if it cannot be written."""
    try:
        there = next(p for p in (folder, *folder.parents) if p.exists())
        if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
            return None
        return shutil.disk_usage(there).free
    except OSError:
        return None


def elsewhere(variable: str, least: int) -> str:
    """The command that sets ``variable`` to a folder with more space; "" if there is none."""
    room = {}
    for place in _places():
        folder = Path(place) / "vision-backbones"
        if variable != _KERNELS or kernel_flaw(folder / "native") is None:
            room[folder] = free_bytes(folder) or 0
    most = max(room.values(), default=0)
    if most <= least:
        return ""
    return f"export {variable}={shell_word(next(f for f in room if room[f] == most))}"


def _places() -> Iterator[str]:
    home = os.path.expanduser("~")
    if home != "~":  # a home directory is known
        yield os.path.join(home, ".cache")
    for find in (os.getcwd, tempfile.gettempdir):
        with contextlib.suppress(OSError):  # the folder was removed, or there is none
            yield find()


def kernel_flaw(folder: Path) -> Flaw | None:
    """Why compiled kernels cannot be cached in ``folder``; None if they can."""
    flaw = cache.flaw(folder) or cache.refused(folder)
    if flaw is None and free_bytes(folder) is None:
        return Flaw(f"{shell_word(folder)} cannot be written")
    return flaw


def mend_kernel_cache() -> str:
    """The command that makes the user's kernel cache usable; "" if there is none."""
    flaw = kernel_flaw(cpu.cache_dir())
    return (flaw.mend if flaw else "") or elsewhere(_KERNELS, 0)
