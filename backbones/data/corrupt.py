"""Undecodable images are recorded, counted and tolerated up to a given fraction."""

from __future__ import annotations

from pathlib import Path

from backbones.common.errors import DataError
from backbones.common.messages import joined_lines, one_line


class CorruptImages:
    """The list of undecodable images, in a file that all processes append to.

    Args:
        path: the file with one name per line; missing if there are none.
        allowed: maximum fraction of undecodable images; even with 1, one must be readable.
    """

    def __init__(self, path: Path, allowed: float) -> None:
        self.path = path
        self.allowed = allowed
        self._added: set[str] = set()

    def add(self, name: str, error: Exception, size: int) -> None:
        """Record one of ``size`` images, once, and stop the run if there are too many.

        Short lines are appended atomically.
        """
        if name in self._added:
            return
        self._added.add(name)
        line = f"{one_line(name)}\t{type(error).__name__}: {joined_lines(error)}"[:1000] + "\n"
        with open(self.path, "a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(line)
        count = self.count()
        if count >= size:
            problem = f"none of the {size} images can be read"
        elif count > self.allowed * size:
            allowed = f"more than max_corrupt={self.allowed:g} allows"
            problem = f"{count} of {size} images cannot be read, {allowed}"
        else:
            return
        raise DataError(f"{problem}; {self.path} lists them")

    def count(self) -> int:
        """The number of distinct images."""
        lines = self.path.read_bytes().splitlines() if self.path.exists() else []
        return len({line.split(b"\t")[0] for line in lines})
