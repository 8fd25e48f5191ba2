"""The workspace of replays: memory that is kept between calls.

The operating system zeroes new pages when they are first written to. For feature maps of many MiB,
whose memory the C library returns to the system when it is freed, that takes as long as computing
them.
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

# A piece is freed after this many consecutive calls that needed at most half of it.
_PATIENCE = 16


@dataclass(eq=False)  # compared by identity
class _Piece:
    memory: Tensor
    idle: int = 0  # calls since one needed more than half of it


class Workspace:
    """A thread-safe pool of memory, with one piece per concurrent call."""

    def __init__(self) -> None:
        self._pieces: list[_Piece] = []
        # Never waited for: in a process forked while it is held, it stays locked forever.
        self._lock = threading.Lock()

    @contextmanager
    def borrow(self, nbytes: int) -> Iterator[Tensor]:
        """At least ``nbytes`` uninitialised bytes: (N,) uint8, not an inference tensor."""
        piece = self._taken(nbytes)
        yield piece.memory
        if 2 * nbytes > piece.memory.nbytes:
            piece.idle = 0
        if self._lock.acquire(blocking=False):
            self._pieces.append(piece)
            self._lock.release()

    def clear(self) -> None:
        """Free all memory that no call is using."""
        self._pieces = []

    @property
    def nbytes(self) -> int:
        """Total size of the memory that no call is using."""
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
        """Take the smallest sufficient piece; without one, free the largest and return None."""
        for piece in self._pieces:
            piece.idle += 1
        pieces = [p for p in self._pieces if p.idle <= _PATIENCE]
        pieces.sort(key=lambda p: (p.memory.nbytes, p.idle))
        fitting = [p for p in pieces if p.memory.nbytes >= nbytes][:1]
        self._pieces = [p for p in pieces if p not in (fitting or pieces[-1:])]
        return fitting[0] if fitting else None


workspace = Workspace()
"""The workspace shared by all replays."""
