"""Standard streams with encodings other than the tests' own."""

from __future__ import annotations

import io

__all__ = ["Stream"]


class Stream(io.TextIOWrapper):
    """A replacement for ``sys.stdout`` that behaves like a file and records the output."""

    def __init__(self, encoding: str) -> None:
        self._bytes = io.BytesIO()
        super().__init__(self._bytes, encoding=encoding)

    def said(self) -> bytes:
        """The output so far."""
        self.flush()
        return self._bytes.getvalue()
