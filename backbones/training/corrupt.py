"""Images that cannot be decoded are noted, counted and survived, up to a stated share."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

from PIL import Image

from backbones.training.errors import DataError

__all__ = ["DECODE_ERRORS", "CorruptImages"]

DECODE_ERRORS = (
    *(OSError, SyntaxError, ValueError, TypeError, LookupError, EOFError, OverflowError),
    *(Image.DecompressionBombError, struct.error, zlib.error),
)
"""What Pillow raises of files that are damaged."""


class CorruptImages:
    """The list of images that could not be decoded, in a file that all processes append to.

    Args:
        path: the file, one name a line; empty or missing when all is well.
        allowed: share of the data set that may be corrupt.
    """

    def __init__(self, path: Path, allowed: float) -> None:
        self.path = path
        self.allowed = allowed

    def add(self, name: str, error: Exception) -> None:
        """Note one; a short line is written whole, whoever else writes."""
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(f"{name}\t{type(error).__name__}: {error}".replace("\n", " ")[:1000] + "\n")

    def count(self) -> int:
        """How many different ones there are."""
        if not self.path.exists():
            return 0
        lines = self.path.read_text(encoding="utf-8").splitlines()
        return len({line.split("\t")[0] for line in lines})

    def check(self, size: int) -> None:
        """Stop the run if there are too many.

        Raises:
            DataError: more than ``allowed`` of ``size`` images are corrupt.
        """
        count = self.count()
        if count > self.allowed * size:
            raise DataError(
                f"{count} of {size} images cannot be read, more than max_corrupt={self.allowed:g} "
                f"allows; {self.path} names them"
            )
