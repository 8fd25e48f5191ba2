"""Profile: how long each call of a network takes, in replays where there are any."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ops.cpu.build import status
from ops.replay.graph import Graph
from ops.replay.memory_plan import MemoryPlan
from ops.replay.module import Recorded
from ops.replay.replay import TimedReplay
from ops.replay.trace import Trace, TracedCall

__all__ = ["Profile", "profile"]


@dataclass
class Profile:
    """What :func:`profile` found.

    Attributes:
        calls: in their order; ``seconds`` are medians.
        seconds: of the whole network, without a look at its calls: a median, too.
        graph, plan: of replays; None where there are none.
    """

    calls: list[TracedCall]
    seconds: float
    graph: Graph | None = None
    plan: MemoryPlan | None = None


@torch.inference_mode()
def profile(network: nn.Module, x: Tensor, repeats: int) -> Profile:
    """Run a network some times, as a whole and call by call in turns.

    Graphs that it has stay as they are.
    """
    graphs: AbstractContextManager[None] = nullcontext()
    if isinstance(network, Recorded):
        graphs = network.apart()
    with graphs:
        for _ in range(3):  # which pack weights, capture a graph and replay it
            network(x)
        if isinstance(network, Recorded) and network.is_replayed:
            return _of_replays(network, x, repeats)
        return _of_layers(network, x, repeats)


def _of_replays(network: Recorded, x: Tensor, repeats: int) -> Profile:
    with Trace(x, network) as trace:
        result = network.compute(x)
    graph = trace.finish(result)
    assert len(graph.calls) == len(trace.traced)
    replay = TimedReplay(graph)
    for index in replay.lowered:
        call = trace.traced[index]
        call.library, call.lowered_from = "ours", call.kernel
        call.kernel, call.instruction_set = "pointwise", status("replay").instruction_set
    replay.seconds(x)
    total = _fill_in(trace.traced, lambda: network(x), lambda: replay.seconds(x), repeats)
    return Profile(trace.traced, total, graph, replay.plan)


def _of_layers(network: nn.Module, x: Tensor, repeats: int) -> Profile:
    def traced() -> list[TracedCall]:
        with Trace(x, network) as trace:
            network(x)
        return trace.traced

    calls = traced()
    seconds = lambda: (call.seconds for call in traced())  # noqa: E731
    return Profile(calls, _fill_in(calls, lambda: network(x), seconds, repeats))


def _fill_in(
    calls: list[TracedCall],
    whole: Callable[[], object],
    by_call: Callable[[], Iterable[float]],
    repeats: int,
) -> float:
    """Set the seconds of the calls; return those of the whole."""
    totals: list[float] = []
    parts: list[list[float]] = []
    for _ in range(repeats):
        begin = time.perf_counter()
        whole()
        totals.append(time.perf_counter() - begin)
        parts.append(list(by_call()))
    for call, seconds in zip(calls, zip(*parts, strict=True), strict=True):
        call.seconds = statistics.median(seconds)
    return statistics.median(totals)
