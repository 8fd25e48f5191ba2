"""The memory plan of a graph: which buffers share a workspace, and at which offsets."""

from __future__ import annotations

import operator
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from ops.replay.graph import Buffer, KernelCall, TorchCall

_LINE = 64  # alignment of buffers in bytes: a cache line


@dataclass
class MemoryPlan:
    """The placement of buffers.

    Attributes:
        uses: lifetime of each buffer.
        offsets: workspace offset of each buffer that torch does not allocate.
        nbytes: size of the workspace.
    """

    uses: list[Use]
    offsets: dict[int, int]
    nbytes: int


@dataclass
class Use:
    """The lifetime of a buffer: first and last call, and whether torch allocates or reads it.

    Inputs are live before the first call, and they and results after the last.
    """

    first: int
    last: int
    made: bool = False
    by_torch: bool = False


def plan_memory(
    calls: Sequence[KernelCall | TorchCall],
    buffers: Sequence[Buffer],
    results: Collection[int],
    inputs: int = 1,
) -> MemoryPlan:
    """Plan the memory of calls in this order.

    Args:
        buffers: the first ones are the inputs.
        results: the indices of those that are returned.
        inputs: the number of inputs.
    """
    uses = [Use(len(calls), -1) for _ in buffers]
    for now, call in enumerate(calls):
        by_torch = isinstance(call, TorchCall)
        made = call.results.values()
        for index in (*made, *(place.buffer for place in call.places())):
            use = uses[index]
            use.first, use.last = min(use.first, now), now
            use.by_torch |= by_torch
        for index in made:
            uses[index].made = True
    for index in range(inputs):
        uses[index].first = -1
    for index in (*range(inputs), *results):
        uses[index].last = len(calls)
    return MemoryPlan(uses, *lay_out(buffers, uses))


def lay_out(buffers: Sequence[Buffer], uses: Sequence[Use]) -> tuple[dict[int, int], int]:
    """Workspace offsets of the buffers that torch does not allocate, and the workspace's size.

    Buffers are placed largest first, each at the lowest offset that is free during its lifetime.
    """
    calls = uses[0].last
    within = [i for i, use in enumerate(uses) if not use.made and 0 <= use.last < calls]
    placed: list[tuple[int, int, Use]] = []  # begin, end, lifetime
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
