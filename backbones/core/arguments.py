"""Command-line arguments: paths, numbers in a range, devices, output files.

The first functions are ``argparse`` types: they convert a word to a value, or raise an error that
says what is allowed.
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
    "CREATION_ERRORS",
    "THREADS",
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
    """A type for names of files or folders; an empty name would mean the current folder."""
    if not word or "\0" in word:
        raise argparse.ArgumentTypeError(f"must be the name of a file or folder, not {word!r}")
    return word


def nonempty_path(word: str) -> Path:
    """:func:`nonempty` as a path."""
    return Path(nonempty(word))


def whole(low: int, high: int | None = None) -> Callable[[str], int]:
    """A type for integers ≥ ``low`` and, if given, ≤ ``high``."""

    def convert(word: str) -> int:
        try:
            number = int(word)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a whole number, not {shown(word)}") from None
        return _within(number, number >= low, f"at least {low}", high)

    return convert


def real(low: float, high: float | None = None, above: bool = False) -> Callable[[str], float]:
    """A type for finite numbers ≥ ``low`` and, if given, ≤ ``high``.

    Args:
        above: exclude ``low`` itself.
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
"""The type of ``--threads``; PyTorch itself has no upper limit."""


CREATION_ERRORS = (
    *(TypeError, ValueError, ArithmeticError, AssertionError),
    *(AttributeError, LookupError, RuntimeError),
)
"""Exceptions that layers raise for invalid keywords (negative sizes, lists of wrong length)."""


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


def require_writable(
    outputs: Mapping[str, Path | None],
    inputs: Iterable[str | Path | None] = (),
    makes_folders: bool = False,
) -> None:
    """Check output files before any work is done.

    Args:
        outputs: files by option; None for options that are not given.
        inputs: input files, which must not be overwritten.
        makes_folders: whether missing folders will be created.

    Raises:
        CommandError: two outputs are the same file, or an output is an input, a folder, or in a
            folder that cannot be written to.
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
            raise CommandError(f"{option} {file} would overwrite {read[real]}, an input")
        options[real] = option
        if file.is_dir():
            raise CommandError(f"{option} {file} is a folder: name a file in it")
        if not makes_folders and not file.parent.is_dir():
            raise CommandError(f"cannot write {file.name}: there is no folder {file.parent}")
        require_folder(option, file.parent)


def require_folder(option: str, folder: Path) -> None:
    """Check that a folder is writable or can be created.

    Raises:
        CommandError: it is not.
    """
    there = next(p for p in (folder, *folder.parents) if os.path.lexists(p) or p == p.parent)
    if not there.is_dir():
        raise CommandError(f"{option}: {there} is not a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise CommandError(f"{option}: the folder {there} cannot be written to")


def usable_device(name: str) -> torch.device:
    """The device of that name, after creating and reading a tensor on it.

    Raises:
        CommandError: it does not exist, or cannot hold values.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about deprecated names
            device = torch.device(name)
            torch.zeros(1, device=device).tolist()
    except (RuntimeError, AssertionError, ImportError, ValueError, TypeError) as error:
        reason = first_line(error).partition(". ")[0]
        raise CommandError(f"--device {name} cannot be used here: {reason}") from error
    return device
