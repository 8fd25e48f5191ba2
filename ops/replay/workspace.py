"""The workspace of replays: memory that is kept between calls.

The operating system zeroes new pages when they are first written to. For feature maps of many MiB,
whose memory the C library returns to the system when it is freed, that takes as long as computing
them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from ops.cpu.call.huge_pages import ask_for_huge_pages

# A block is freed after this many consecutive calls that needed at most half of it.
_PATIENCE = 16


@dataclass(eq=False)  # compared by identity
class _Block:
    memory: Tensor
    idle: int = 0  # calls since one needed more than half of it


class Workspace:
    """A thread-safe pool of memory, with one block per concurrent call."""

    def __init__(self) -> None:
        self._blocks: list[_Block] = []  # changed by one atomic operation at a time

    @contextmanager
    def borrow(self, nbytes: int) -> Iterator[Tensor]:
        """At least ``nbytes`` uninitialised bytes: (N,) uint8, not an inference tensor."""
        block = self._reuse(nbytes)
        if block is None:
            with torch.inference_mode(False):
                block = _Block(torch.empty(nbytes, dtype=torch.uint8))
            ask_for_huge_pages(block.memory)
        yield block.memory
        if 2 * nbytes > block.memory.nbytes:
            block.idle = 0
        self._blocks.append(block)

    def clear(self) -> None:
        """Free all memory that no call is using."""
        self._blocks.clear()

    @property
    def nbytes(self) -> int:
        """Total size of the memory that no call is using."""
        return sum(block.memory.nbytes for block in self._blocks)

    def _reuse(self, nbytes: int) -> _Block | None:
        """Take the smallest sufficient block; without one, free the largest and return None."""
        blocks: list[_Block] = []
        with suppress(IndexError):
            while True:
                blocks.append(self._blocks.pop())
        for block in blocks:
            block.idle += 1
        blocks = [b for b in blocks if b.idle <= _PATIENCE]
        blocks.sort(key=lambda b: (b.memory.nbytes, b.idle))
        fitting = [b for b in blocks if b.memory.nbytes >= nbytes][:1]
        self._blocks.extend(b for b in blocks if b not in (fitting or blocks[-1:]))
        return fitting[0] if fitting else None


workspace = Workspace()
"""The workspace shared by all replays."""
