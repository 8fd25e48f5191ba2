"""Errors of a training that users can fix; scripts print them without a traceback."""

from __future__ import annotations

from backbones.core.console import MendableError
from backbones.core.messages import joined_lines

__all__ = [
    "BUILDING_ERRORS",
    "CheckpointFileError",
    "DataError",
    "DivergedError",
    "RecipeError",
    "TrainingError",
    "reading_error",
]

BUILDING_ERRORS = (
    *(ArithmeticError, AssertionError, AttributeError, LookupError),
    *(OSError, RuntimeError, TypeError, ValueError),
)
"""Exceptions that networks and optimizers raise for invalid arguments."""


class TrainingError(MendableError):
    """Base class of the errors below."""


class RecipeError(TrainingError, ValueError):
    """An invalid recipe; the message names the key and what is allowed."""


class DataError(TrainingError, ValueError):
    """Invalid data; the message names the path, class or label."""


class CheckpointFileError(TrainingError, RuntimeError):
    """A checkpoint that cannot be written or read; the message names the file."""


class DivergedError(TrainingError, RuntimeError):
    """Loss or weights are not finite: too many times in a row, or in a validation."""


def reading_error(error: BaseException, file: object) -> str:
    """The message of a failed read of a checkpoint, without advice to load it unsafely."""
    if "weights_only" not in str(error):
        return joined_lines(error)
    return f"{file} is not a checkpoint of tensors and plain values; it was not executed"
