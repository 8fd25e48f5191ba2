"""The errors of a training that a user can mend; scripts print them without a traceback."""

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
"""What networks and optimizers raise of arguments that their authors did not think of."""


class TrainingError(MendableError):
    """Any of the below."""


class RecipeError(TrainingError, ValueError):
    """A recipe that cannot be used; the message names the key and what would be right."""


class DataError(TrainingError, ValueError):
    """Data that cannot be trained on; the message names the path, class or label."""


class CheckpointFileError(TrainingError, RuntimeError):
    """A checkpoint that cannot be written or read; the message names the file."""


class DivergedError(TrainingError, RuntimeError):
    """Loss or weights ceased to be finite: too many times in a row, or at a validation."""


def reading_error(error: BaseException, file: object) -> str:
    """What a reader said of a checkpoint, but for its advice to load it unsafely."""
    if "weights_only" not in str(error):
        return joined_lines(error)
    return f"{file} holds more than tensors and plain values, or is no checkpoint; it was not run"
