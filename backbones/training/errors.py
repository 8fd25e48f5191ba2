"""The errors of a training that a user can mend; scripts print them without a traceback."""

from __future__ import annotations

__all__ = ["CheckpointFileError", "DataError", "DivergedError", "RecipeError", "TrainingError"]


class TrainingError(Exception):
    """Any of the below."""


class RecipeError(TrainingError, ValueError):
    """A recipe that cannot be used; the message names the key and what would be right."""


class DataError(TrainingError, ValueError):
    """Data that cannot be trained on; the message names the path, class or label."""


class CheckpointFileError(TrainingError, RuntimeError):
    """A checkpoint that cannot be written or read; the message names the file."""


class DivergedError(TrainingError, RuntimeError):
    """The loss was not finite too many times in a row."""
