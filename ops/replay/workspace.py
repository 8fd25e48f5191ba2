"""The workspace of replays: memory that is kept from one call to the next.

The system clears what it gives, page by page, as it is first written to. For maps of many MiB,
which the C library does not keep, that takes as long as computing them.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from ops.cpu.huge_pages import ask_for_huge_pages

__all__ = ["Workspace", "workspace"]

# After so many calls in a row that could do with half of a piece, or without it, it is given back.
_PATIENCE = 16


@dataclass(eq=False)  # compared by identity
class _Piece:
    memory: Tensor
    idle: int = 0  # calls since one needed it


class Workspace:
    """Pieces of memory, as many as there are calls at a time. Threads share them."""

    def __init__(self) -> None:
        self._pieces: list[_Piece] = []
        # Nobody waits for it: a process forked while it is held will never get it.
        self._lock = threading.Lock()

    @contextmanager
    def borrow(self, nbytes: int) -> Iterator[Tensor]:
        """So many bytes or more, of any value: (N,) uint8, not an inference tensor."""
        piece = self._taken(nbytes)
        yield piece.memory
        if 2 * nbytes > piece.memory.nbytes:
            piece.idle = 0
        if self._lock.acquire(blocking=False):
            self._pieces.append(piece)
            self._lock.release()

    def clear(self) -> None:
        """Give back what no call uses now."""
        self._pieces = []

    @property
    def nbytes(self) -> int:
        """What is kept."""
        return sum(piece.memory.nbytes for piece in self._pieces)

    def _taken(self, nbytes: int) -> _Piece:
        kept = None
        if self._lock.acquire(blocking=False):
            try:
                kept = self._kept(nbytes)
            finally:
                self._lock.release()
        if kept is not None:
            return kept
        with torch.inference_mode(False):
            memory = torch.empty(nbytes, dtype=torch.uint8)
        ask_for_huge_pages(memory)
        return _Piece(memory)

    def _kept(self, nbytes: int) -> _Piece | None:
        """The smallest that is large enough; where none is, the largest makes room for another."""
        for piece in self._pieces:
            piece.idle += 1
        pieces = [p for p in self._pieces if p.idle <= _PATIENCE]
        pieces.sort(key=lambda p: (p.memory.nbytes, p.idle))
        fitting = [p for p in pieces if p.memory.nbytes >= nbytes][:1]
        self._pieces = [p for p in pieces if p not in (fitting or pieces[-1:])]
        return fitting[0] if fitting else None


workspace = Workspace()
"""The one that all replays share."""
