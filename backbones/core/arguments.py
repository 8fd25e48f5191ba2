"""What may stand on a command line: paths, numbers within their range, devices, files to write.

The first functions are types for ``argparse``: from a word to a value, or a sentence on what would
be right.
"""

from __future__ import annotations

import argparse
import math
import os
import stat
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TypeVar

import torch

from backbones.core.console import CommandError
from backbones.core.messages import first_line, shown

__all__ = [
    "THREADS",
    "UNMAKEABLE",
    "file_problem",
    "nonempty",
    "nonempty_path",
    "real",
    "require_folder",
    "require_writable",
    "usable_device",
    "whole",
]


def nonempty(word: str) -> str:
    """The name of a file or folder: an empty one would be the current folder's."""
    if not word or "\0" in word:
        raise argparse.ArgumentTypeError(f"must be the name of a file or folder, not {word!r}")
    return word


def nonempty_path(word: str) -> Path:
    """:func:`nonempty` as a path."""
    return Path(nonempty(word))


def whole(low: int, high: int | None = None) -> Callable[[str], int]:
    """A type of whole numbers from ``low`` on, up to ``high`` if there is one."""

    def convert(word: str) -> int:
        try:
            number = int(word)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a whole number, not {shown(word)}") from None
        return _within(number, number >= low, f"at least {low}", high)

    return convert


def real(low: float, high: float | None = None, above: bool = False) -> Callable[[str], float]:
    """A type of finite numbers from ``low`` on, up to ``high`` if there is one.

    Args:
        above: ``low`` itself is not among them.
    """

    def convert(word: str) -> float:
        try:
            number = float(word)
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise argparse.ArgumentTypeError(f"must be a number, not {shown(word)}")
        great = number > low if above else number >= low
        return _within(number, great, f"{'above' if above else 'at least'} {low:g}", high)

    return convert


_Number = TypeVar("_Number", int, float)


def _within(number: _Number, great: bool, least: str, high: float | None) -> _Number:
    if not great:
        raise argparse.ArgumentTypeError(f"must be {least}, not {shown(number)}")
    if high is not None and number > high:
        raise argparse.ArgumentTypeError(f"must be at most {high:g}, not {shown(number)}")
    return number


THREADS = whole(1, 1024)
"""The type of ``--threads``: PyTorch would start as many as are asked for."""


UNMAKEABLE = (
    *(TypeError, ValueError, ArithmeticError, AssertionError),
    *(AttributeError, LookupError, RuntimeError),
)
"""What layers raise of keywords that make none (sizes below 0, lists of another length)."""


def file_problem(file: str | Path) -> str | None:
    """Why ``file`` cannot be read as a file that lies on a disk; None if it can.

    Opening a named pipe would wait until somebody writes to it, and a device may never end.
    """
    try:
        mode = os.stat(file).st_mode
    except FileNotFoundError:
        return "is a link to nothing" if os.path.islink(file) else "does not exist"
    except (OSError, ValueError) as error:
        return f"cannot be looked at: {getattr(error, 'strerror', None) or error}"
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


def require_writable(
    outputs: Mapping[str, Path | None],
    inputs: Iterable[str | Path | None] = (),
    makes_folders: bool = False,
) -> None:
    """Refuse files that could not be written in the end, before any work is done.

    Args:
        outputs: files by the option that names them; None for options that are not given.
        inputs: files that are read, which must not be written over.
        makes_folders: whether those that are missing will be made.

    Raises:
        CommandError: two outputs are one file, one of them is an input, or a folder, or lies in
            none that can be written to.
    """
    read = {os.path.realpath(file): file for file in inputs if file is not None}
    options: dict[str, str] = {}
    for option, file in outputs.items():
        if file is None:
            continue
        real = os.path.realpath(file)
        if real in options:
            raise CommandError(f"{options[real]} and {option} are both {file}: name two files")
        if real in read:
            raise CommandError(f"{option} {file} would be written over {read[real]}, an input")
        options[real] = option
        if file.is_dir():
            raise CommandError(f"{option} {file} is a folder: name a file in it")
        if not makes_folders and not file.parent.is_dir():
            raise CommandError(f"there is no folder {file.parent} to write {file.name} to")
        require_folder(option, file.parent)


def require_folder(option: str, folder: Path) -> None:
    """Refuse a folder that cannot be written to, nor be made.

    Raises:
        CommandError: it says why.
    """
    there = next(p for p in (folder, *folder.parents) if os.path.lexists(p) or p == p.parent)
    if not there.is_dir():
        raise CommandError(f"{option}: {there} is no folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise CommandError(f"{option}: the folder {there} cannot be written to")


def usable_device(name: str, option: str = "--device") -> torch.device:
    """The device of that name, on which a tensor has been made and read.

    Raises:
        CommandError: there is none, or it holds no values.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of names that are no longer in use
            device = torch.device(name)
            torch.zeros(1, device=device).tolist()
    except (RuntimeError, AssertionError, ImportError, ValueError, TypeError) as error:
        reason = first_line(error).partition(". ")[0]
        raise CommandError(f"{option} {name} cannot be used here: {reason}") from error
    return device
