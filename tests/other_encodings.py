"""Standard streams of other encodings than the tests' own."""

from __future__ import annotations

import io

__all__ = ["Stream"]


class Stream(io.TextIOWrapper):
    """In the place of ``sys.stdout``, as if it led to a file; what came can be looked at."""

    def __init__(self, encoding: str) -> None:
        self._bytes = io.BytesIO()
        super().__init__(self._bytes, encoding=encoding)

    def said(self) -> bytes:
        """What was written so far."""
        self.flush()
        return self._bytes.getvalue()
