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
from typing import Any, TypeVar

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


FILE: dict[str, Any] = {"type": nonempty_path, "metavar": "FILE"}
"""The further arguments of an option that names a file."""


def whole(low: int, high: int | None = None) -> Callable[[str], int]:
    """A type for integers ≥ ``low`` and, if given, ≤ ``high``."""
    return _type_of(int, "a whole number", Range(low=low, high=math.inf if high is None else high))


def real(low: float, high: float | None = None, above: bool = False) -> Callable[[str], float]:
    """A type for finite numbers ≥ ``low`` (with ``above``, > ``low``) and, if given, ≤ ``high``."""
    highest = math.inf if high is None else high
    span = Range(above=low, high=highest) if above else Range(low=low, high=highest)
    return _type_of(float, "a number", span)


_Number = TypeVar("_Number", int, float)


def _type_of(kind: type[_Number], name: str, span: Range) -> Callable[[str], _Number]:
    def convert(word: str) -> _Number:
        try:
            number = kind(word)
            if not -math.inf < number < math.inf:
                raise ValueError(word)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be {name}, not {shown(word)}") from None
        if not span.holds(number):
            raise argparse.ArgumentTypeError(f"must be {span}, not {shown(number)}")
        return number

    return convert


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
