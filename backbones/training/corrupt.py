"""Images that cannot be decoded are noted, counted and survived, up to a stated share."""

from __future__ import annotations

from pathlib import Path

from backbones.core.messages import joined_lines, one_line
from backbones.training.errors import DataError

__all__ = ["CorruptImages"]

_MOST_IN_A_ROW = 1000


class CorruptImages:
    """The list of images that could not be decoded, in a file that all processes append to.

    Args:
        path: the file, one name a line; empty or missing when all is well.
        allowed: share of the data set that may be corrupt. All of it may not.
    """

    def __init__(self, path: Path, allowed: float) -> None:
        self.path = path
        self.allowed = allowed
        self.in_a_row = 0
        self._names: set[str] = set()
        self._read = 0  # bytes of the file that are in the names

    def add(self, name: str, error: Exception) -> None:
        """Note one; a short line is written whole, whoever else writes."""
        line = f"{one_line(name)}\t{type(error).__name__}: {joined_lines(error)}"[:1000] + "\n"
        with open(self.path, "a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(line)
        self.in_a_row += 1

    def add_good(self) -> None:
        """Note that an image could be decoded."""
        self.in_a_row = 0

    def count(self) -> int:
        """How many different ones there are."""
        if self.path.exists():
            with open(self.path, "rb") as file:
                file.seek(self._read)
                whole = file.read().rpartition(b"\n")[0]
            self._read += len(whole) + 1 if whole else 0
            self._names |= {line.split(b"\t")[0].decode() for line in whole.splitlines()}
        return len(self._names)

    def check(self, size: int) -> None:
        """Stop the run if there are too many.

        Raises:
            DataError: more than ``allowed`` of ``size`` images are corrupt, or all of them, or so
                many one after the other that the search for a good one is given up.
        """
        count = self.count()
        if count >= size:
            problem = f"none of the {size} images can be read"
        elif count > self.allowed * size:
            allowed = f"more than max_corrupt={self.allowed:g} allows"
            problem = f"{count} of {size} images cannot be read, {allowed}"
        elif self.in_a_row >= _MOST_IN_A_ROW:
            problem = f"{self.in_a_row} images one after the other cannot be read"
        else:
            return
        raise DataError(f"{problem}; {self.path} names them")
