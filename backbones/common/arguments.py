"""Command-line arguments: paths, numbers in a range, devices.

The first functions are ``argparse`` types: they convert a word to a value, or raise an error that
says what is allowed.
"""

from __future__ import annotations

import argparse
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from backbones.common.errors import CommandError
from backbones.common.keys import Range
from backbones.common.messages import first_line, shown


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
    span = Range(low=low, high=math.inf if high is None else high)

    def convert(word: str) -> int:
        try:
            number = int(word)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a whole number, not {shown(word)}") from None
        return _within(span, number)

    return convert


def real(low: float, high: float | None = None, above: bool = False) -> Callable[[str], float]:
    """A type for finite numbers ≥ ``low`` and, if given, ≤ ``high``.

    Args:
        above: exclude ``low`` itself.
    """
    highest = math.inf if high is None else high
    span = Range(above=low, high=highest) if above else Range(low=low, high=highest)

    def convert(word: str) -> float:
        try:
            number = float(word)
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise argparse.ArgumentTypeError(f"must be a number, not {shown(word)}")
        return _within(span, number)

    return convert


_Number = TypeVar("_Number", int, float)


def _within(span: Range, number: _Number) -> _Number:
    if not span.holds(number):
        raise argparse.ArgumentTypeError(f"must be {span}, not {shown(number)}")
    return number


THREADS = whole(1, 1024)
"""The type of ``--threads``; PyTorch itself has no upper limit."""


def usable_device(name: str, option: str = "--device") -> torch.device:
    """The device of that name, after creating and reading a tensor on it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about deprecated names
            device = torch.device(name)
            torch.zeros(1, device=device).tolist()
    except (RuntimeError, AssertionError, ImportError, ValueError, TypeError) as error:
        reason = first_line(error).partition(". ")[0]
        raise CommandError(f"{option} {name} cannot be used here: {reason}") from error
    return device
