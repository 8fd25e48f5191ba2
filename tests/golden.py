"""The figures of the originals, under the name that the tests know them by."""

from backbones.cli.parity import (
    FOLDER,
    TOLERANCE,
    case_errors,
    checkpoint,
    image,
    reference,
    relative_error,
    summary_error,
    tolerance,
    uniform,
    variants,
)

__all__ = [
    "FOLDER",
    "TOLERANCE",
    "case_errors",
    "checkpoint",
    "image",
    "reference",
    "relative_error",
    "summary_error",
    "tolerance",
    "uniform",
    "variants",
]
