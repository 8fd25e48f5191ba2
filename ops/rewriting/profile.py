"""Profile: the time of each call of a network, measured in replays if it can be replayed."""

from __future__ import annotations

import functools
import itertools
import statistics
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ops.cpu.build import status
from ops.replay.changes import ModuleSnapshot
from ops.replay.graph import Graph, NotCapturableError
from ops.replay.memory_plan import MemoryPlan
from ops.replay.replay import Replay
from ops.rewriting.module import Rewritten
from ops.rewriting.trace import Trace, TracedCall, clock

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
    """Time a network in eval mode, alternating between runs as a whole and runs call by call.

    The state of its modules (mode, packed weights, graphs) is restored afterwards.
    """
    with _state_restored(network):
        for module in network.modules():
            module.training = False
            if isinstance(module, Rewritten):
                module.forget()
        for _ in range(3):  # pack weights, capture a graph, replay it
            network(x)
        if isinstance(network, Rewritten) and network.is_replayed:
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


def _of_replays(network: Rewritten, x: Tensor, repeats: int) -> Profile:
    program = _program(network, x)
    program(x)  # packs weights
    with Trace(x, network) as trace:
        result = program(x)
    graph = trace.finish(result)
    assert len(graph.calls) == len(trace.traced)
    now, stamps = clock(), list[float]()
    replay = Replay(graph, between_calls=lambda: stamps.append(now()))
    for index in replay.lowered:
        call = trace.traced[index]
        call.library, call.lowered_from = "ours", call.kernel
        call.kernel, call.instruction_set = "pointwise", status("replay").instruction_set

    def seconds() -> list[float]:
        stamps.clear()
        replay(x)
        return [end - begin for begin, end in itertools.pairwise(stamps)]

    seconds()
    total = _measure(trace.traced, lambda: network(x), seconds, repeats)
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
    if isinstance(network, Rewritten):
        try:
            ModuleSnapshot(network)
            _program(network, x)
        except NotCapturableError as error:
            obstacle = str(error)
    return Profile(first.traced, total, obstacle=obstacle)


def _program(network: Rewritten, x: Tensor) -> Callable[[Tensor], Any]:
    forward: Any = type(network).stands_for.forward  # type: ignore[attr-defined]
    return network.program(x, functools.partial(forward, network))


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
