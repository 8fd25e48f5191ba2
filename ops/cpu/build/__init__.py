"""Finds, compiles and loads the kernels' libraries.

:class:`ops.cpu.build.libraries.Libraries` holds everything that a process knows about them; there
is one for the process, :data:`process`, which the functions here use.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

from ops.cpu.build.folders import user_cache as cache_dir
from ops.cpu.build.libraries import Libraries, LibraryState
from ops.cpu.instruction_sets import instruction_set

__all__ = [
    "Libraries",
    "LibraryState",
    "cache_dir",
    "instruction_set",
    "load",
    "prepare",
    "process",
    "status",
    "unavailable_reason",
]

process = Libraries()

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: process.forget_threads())


def load(name: str) -> ctypes.CDLL | None:
    """The library of the kernel ``name``, compiled if needed; ``None`` if it is unavailable.

    The outcome is cached for the life of the process.

    Raises:
        ValueError: no such kernel exists.
        SettingError: an environment variable has an invalid value.
    """
    return status(name).library


def unavailable_reason(name: str) -> str | None:
    """Why :func:`load` returns ``None``, or ``None`` if it returns a library."""
    return status(name).reason


def status(name: str) -> LibraryState:
    """Build and load the kernel ``name`` on the first call; later calls return the same state."""
    return process.states.get(name) or process.status(name)


def prepare(isa: str) -> Path | None:
    """See :meth:`Libraries.prepare`."""
    return process.prepare(isa)
