"""Profile: the time of each call of a network, measured in replays if it can be replayed."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ops.cpu.build import status
from ops.replay.clock import clock
from ops.replay.graph import Graph
from ops.replay.memory_plan import MemoryPlan
from ops.replay.module import Recorded
from ops.replay.replay import TimedReplay
from ops.replay.trace import Trace, TracedCall

__all__ = ["Profile", "profile"]


@dataclass
class Profile:
    """The result of :func:`profile`.

    Attributes:
        calls: in execution order; ``seconds`` are medians.
        seconds: median time of the whole network, run without timing its calls.
        graph, plan: of the replays; None if the network is not replayed.
        obstacle: why a network that supports replay is not replayed.
    """

    calls: list[TracedCall]
    seconds: float
    graph: Graph | None = None
    plan: MemoryPlan | None = None
    obstacle: str | None = None


@torch.inference_mode()
def profile(network: nn.Module, x: Tensor, repeats: int) -> Profile:
    """Time a network, alternating between runs as a whole and runs call by call.

    The state of its modules (packed weights, graphs) is restored afterwards.
    """
    with _state_restored(network):
        for module in network.modules():
            if isinstance(module, Recorded):
                module.forget()
        for _ in range(3):  # pack weights, capture a graph, replay it
            network(x)
        if isinstance(network, Recorded) and network.is_replayed:
            return _of_replays(network, x, repeats)
        return _of_layers(network, x, repeats)


@contextmanager
def _state_restored(network: nn.Module) -> Iterator[None]:
    before = [(vars(module), dict(vars(module))) for module in network.modules()]
    try:
        yield
    finally:
        for attributes, values in before:
            for name in attributes.keys() - values.keys():
                del attributes[name]
            changed = [name for name, value in values.items() if attributes[name] is not value]
            attributes.update({name: values[name] for name in changed})


def _of_replays(network: Recorded, x: Tensor, repeats: int) -> Profile:
    program = network.program(x, network.compute)
    program(x)  # packs weights
    with Trace(x, network) as trace:
        result = program(x)
    graph = trace.finish(result)
    assert len(graph.calls) == len(trace.traced)
    replay = TimedReplay(graph)
    for index in replay.lowered:
        call = trace.traced[index]
        call.library, call.lowered_from = "ours", call.kernel
        call.kernel, call.instruction_set = "pointwise", status("replay").instruction_set
    replay.seconds(x)
    total = _measure(trace.traced, lambda: network(x), lambda: replay.seconds(x), repeats)
    return Profile(trace.traced, total, graph, replay.plan)


def _of_layers(network: nn.Module, x: Tensor, repeats: int) -> Profile:
    def traced() -> Trace:
        with Trace(x, network) as trace:
            network(x)
        return trace

    def seconds() -> Iterator[float]:
        return (call.seconds for call in traced().traced)

    first = traced()
    total = _measure(first.traced, lambda: network(x), seconds, repeats)
    obstacle = None
    if isinstance(network, Recorded):
        obstacle = network.obstacle() or (str(first.failure) if first.failure else None)
    return Profile(first.traced, total, obstacle=obstacle)


def _measure(
    calls: list[TracedCall],
    whole: Callable[[], object],
    by_call: Callable[[], Iterable[float]],
    repeats: int,
) -> float:
    """Set the seconds of each call and return the whole network's."""
    now = clock()
    totals: list[float] = []
    parts: list[list[float]] = []
    for _ in range(repeats):
        begin = now()
        whole()
        totals.append(now() - begin)
        parts.append(list(by_call()))
    for call, seconds in zip(calls, zip(*parts, strict=True), strict=True):
        call.seconds = statistics.median(seconds)
    return statistics.median(totals)
