"""Errors that users can fix; commands print them in one line, without a traceback."""

from __future__ import annotations

import importlib
import re
from typing import Any

import torch

from backbones.common.messages import first_line

CREATION_ERRORS = (
    *(TypeError, ValueError, ArithmeticError, AssertionError),
    *(AttributeError, LookupError, RuntimeError),
)
"""Exceptions that layers raise for invalid keywords (negative sizes, lists of wrong length)."""
BUILDING_ERRORS = (*CREATION_ERRORS, OSError)
"""These, and those of a file of weights."""

# PyTorch's messages on a CPU if memory, or the address space, does not suffice.
_NO_MEMORY = re.compile(
    r"DefaultCPUAllocator|Storage size calculation overflowed|Stride calculation overflowed"
    r"|allocate memory|invalid size, try allocating"
)


class MendableError(Exception):
    """An error that the user can fix; the message is one line that says how."""


class CommandError(MendableError, ValueError):
    """A command line that cannot be executed."""


class RecipeError(MendableError, ValueError):
    """An invalid recipe; the message names the key and what is allowed."""


class DataError(MendableError, ValueError):
    """Invalid data; the message names the path, class or label."""


class FileError(MendableError, RuntimeError):
    """A file that cannot be written, or a checkpoint that cannot be read; the message names it."""


def required(
    module: str, use: str, package: str = "", kind: type[MendableError] = MendableError
) -> Any:
    """Import an optional module; an error of ``kind`` says that ``use`` needs its package."""
    try:
        return importlib.import_module(module)
    except ImportError:
        name = package or module
        raise kind(f"{use} needs {name}: pip install {name}") from None


def memory_shortage(error: BaseException) -> str | None:
    """The message for an out-of-memory error; None for other errors."""
    text = str(error)
    if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and not _NO_MEMORY.search(text):
        return None
    return f"not enough memory: {first_line(error)}" if text else "not enough memory"
