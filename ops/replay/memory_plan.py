"""The memory plan of a graph: which buffers share a workspace, and where in it they lie."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass

from ops.replay.graph import Buffer, KernelCall, TorchCall

__all__ = ["MemoryPlan", "Use", "lay_out", "plan_memory", "uses_of"]

_LINE = 64  # bytes, that buffers begin with


@dataclass
class MemoryPlan:
    """Where buffers lie.

    Attributes:
        uses: of each buffer.
        offsets: in the workspace, of those that torch does not allocate.
        nbytes: of the workspace.
    """

    uses: list[Use]
    offsets: dict[int, int]
    nbytes: int


def plan_memory(
    calls: Sequence[KernelCall | TorchCall], buffers: Sequence[Buffer], result: int
) -> MemoryPlan:
    """The plan for calls in this order; ``result`` is the buffer that is returned."""
    uses = uses_of(calls, len(buffers), result)
    return MemoryPlan(uses, *lay_out(buffers, uses))


@dataclass
class Use:
    """Of a buffer: the first and the last call with it, whether torch makes it or reads it.

    The input is there before the first call, and the result after the last.
    """

    first: int
    last: int
    made: bool = False
    by_torch: bool = False


def uses_of(calls: Sequence[KernelCall | TorchCall], buffers: int, result: int) -> list[Use]:
    """Which calls use each buffer; the first is the input, and ``result`` is returned."""
    uses = [Use(len(calls), -1) for _ in range(buffers)]
    for now, call in enumerate(calls):
        by_torch = isinstance(call, TorchCall)
        made = list(call.results.values()) if isinstance(call, TorchCall) else []
        places = call.views() if isinstance(call, TorchCall) else call.places()
        for index in (*made, *(place.buffer for place in places)):
            use = uses[index]
            use.first, use.last = min(use.first, now), now
            use.by_torch |= by_torch
        for index in made:
            uses[index].made = True
    uses[0].first = -1
    uses[0].last = uses[result].last = len(calls)
    return uses


def lay_out(buffers: Sequence[Buffer], uses: Sequence[Use]) -> tuple[dict[int, int], int]:
    """Offsets in a shared piece of memory of what torch does not make, and the bytes of that.

    The largest first, each lies as low as it can beside those that are in use at the same time.
    """
    calls = uses[0].last
    within = [i for i, use in enumerate(uses) if not use.made and 0 <= use.last < calls]
    placed: list[tuple[int, int, Use]] = []  # from and to where
    offsets: dict[int, int] = {}
    for index in sorted(within, key=lambda i: -buffers[i].nbytes):
        use = uses[index]
        size = -(-buffers[index].nbytes // _LINE) * _LINE
        offset = 0
        for begin, end, other in sorted(placed, key=operator.itemgetter(0)):
            if other.last < use.first or use.last < other.first:
                continue
            if begin >= offset + size:
                break
            offset = max(offset, end)
        placed.append((offset, offset + size, use))
        offsets[index] = offset
    return offsets, max((end for _, end, _ in placed), default=0)
