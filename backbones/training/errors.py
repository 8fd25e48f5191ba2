"""The errors of a training that a user can mend; scripts print them without a traceback."""

from __future__ import annotations

import reprlib

__all__ = [
    "BUILDING_ERRORS",
    "CheckpointFileError",
    "DataError",
    "DivergedError",
    "RecipeError",
    "TrainingError",
    "first_line",
    "one_line",
    "reading_error",
    "shown",
]

BUILDING_ERRORS = (
    *(ArithmeticError, AssertionError, AttributeError, LookupError),
    *(OSError, RuntimeError, TypeError, ValueError),
)
"""What networks and optimizers raise of arguments that their authors did not think of."""

_LONGEST = 1500


class TrainingError(Exception):
    """Any of the below."""


class RecipeError(TrainingError, ValueError):
    """A recipe that cannot be used; the message names the key and what would be right."""


class DataError(TrainingError, ValueError):
    """Data that cannot be trained on; the message names the path, class or label."""


class CheckpointFileError(TrainingError, RuntimeError):
    """A checkpoint that cannot be written or read; the message names the file."""


class DivergedError(TrainingError, RuntimeError):
    """Loss or weights ceased to be finite: too many times in a row, or at a validation."""


def one_line(error: object) -> str:
    """A message as one printable line, whatever a file, a flag or another library put into it."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} …"


def first_line(error: BaseException) -> str:
    """What an exception of another library says first; the rest is often advice for programmers."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return one_line(lines[0]) if lines else type(error).__name__


def reading_error(error: BaseException, file: object) -> str:
    """What a reader said of a checkpoint, but for its advice to load it unsafely."""
    if "weights_only" not in str(error):
        return one_line(error)
    return f"{file} holds more than tensors and plain values, or is no checkpoint; it was not run"


def shown(value: object) -> str:
    """A value for a message, shortened: YAML's references let a short file hold a huge one."""
    text = _repr.repr(value)
    return text if len(text) <= 200 else f"{text[:200]} …"


_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = _repr.maxlong = 80
_repr.maxlevel = 3
