"""Profile: each call of a network, with its layer, its time, and the reason for its kernel.

A trace is a capture that also works for networks that cannot be replayed. The calling layer is read
from Python's stack: it is the innermost frame that is a method of one of the network's modules. So
modules need no hooks, and a call is attributed to the module whose method makes it, even if another
module called that method. Networks that can be replayed are timed in replays.
"""

from __future__ import annotations

import itertools
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload

from ops.cpu.build import status
from ops.cpu.call.binding import Kernel
from ops.cpu.flops import function_flops, kernel_flops
from ops.cpu.policy import Decision, observe_decisions
from ops.fuse.record import callers, clock
from ops.fuse.replayed import Replayed
from ops.replay.capture import Capture, allocates
from ops.replay.graph import Graph, tensors_in
from ops.replay.memory_plan import MemoryPlan
from ops.replay.replay import Replay
from ops.rewriting.graph import Operator

__all__ = ["Profile", "Trace", "TracedCall", "profile"]

Shape = tuple[int, ...]

_CALLS = 5  # until a graph is replayed


@dataclass
class TracedCall:
    """A call of a kernel, or of a torch function that computes something.

    Attributes:
        layer: path of the calling module; empty for the network itself.
        library: ``"ours"``, ``"oneDNN"`` (called directly) or ``"torch"``.
        kernel: name of the operator or function in that library.
        inputs: shapes of the tensor arguments, including weights.
        outputs: shapes of the tensors that were returned or written to.
        dtype: of the first output; int8 for products in int8.
        instruction_set: the one the kernel was compiled for; None for other libraries.
        rules: of :mod:`ops.cpu.policy`, as evaluated for this call; empty if there was no choice.
        flops: see :mod:`ops.cpu.flops`; None if not counted.
        seconds: time of the call, without Python around it; see :func:`ops.fuse.record.clock`.
        lowered_from: the torch function that the kernel replaces in replays, if any.
        rewrites: of :mod:`ops.rewriting`, which made the operator.
    """

    layer: str
    library: str
    kernel: str
    inputs: list[Shape]
    outputs: list[Shape]
    dtype: str
    instruction_set: str | None
    rules: list[Decision]
    flops: int | None
    seconds: float
    lowered_from: str | None = None
    rewrites: tuple[str, ...] = ()

    @property
    def rule(self) -> str:
        """Why this kernel was chosen, in words; empty if there was no choice."""
        if self.rewrites and self.lowered_from is None:
            return "; ".join((*map(str, self.rules), f"rewritten: {', '.join(self.rewrites)}"))
        if self.lowered_from is not None:
            return f"a small {self.lowered_from}, without torch in replays"
        return "; ".join(map(str, self.rules))


class Trace(Capture):
    """Context manager that records the calls made on an input; see :class:`Capture`.

    Args:
        x: the input.
        network: the network whose module paths are recorded.

    Attributes:
        traced: the calls; if there is a graph, they match its calls one to one.
    """

    def __init__(self, x: Tensor, network: nn.Module) -> None:
        super().__init__(x)
        self.traced: list[TracedCall] = []
        self._modules = {id(module): (path, module) for path, module in network.named_modules()}
        # By layer: those since its last call, and why its next calls go to torch.
        self._pending: dict[str, list[Decision]] = defaultdict(list)
        self._rejected: dict[str, list[Decision]] = {}
        self._clock, self._begin = clock(), 0.0

    def __enter__(self) -> Trace:
        super().__enter__()
        self._entered.enter_context(observe_decisions(self._note_rule))
        return self

    # -- operators of torch ----------------------------------------------------------------------

    def call(self, operator: OpOverload, args: Any, kwargs: dict[str, Any]) -> Any:
        begin = self._clock()
        result = super().call(operator, args, kwargs)
        seconds = self._clock() - begin
        outputs = tensors_in((result,))
        if _computes(operator, args, kwargs, outputs):
            inputs = tensors_in((args, kwargs))
            flops = function_flops(operator, args, kwargs, result)
            library = "oneDNN" if operator.namespace == "mkldnn" else "torch"
            self._add(library, _short(operator), inputs, outputs, None, flops, seconds)
        return result

    # -- kernels ---------------------------------------------------------------------------------

    def kernel_called(self, kernel: Kernel, function: Any, arguments: Sequence[Any]) -> None:
        super().kernel_called(kernel, function, arguments)
        self._begin = self._clock()

    def kernel_returned(self, kernel: Kernel, given: dict[str, Any], result: Any) -> None:
        seconds = self._clock() - self._begin
        inputs = tensors_in(given)
        outputs = tensors_in((given["out"] if result is None else result,))
        flops = kernel_flops(kernel.name, given, result)
        isa = status(kernel.library).instruction_set
        self._add("ours", kernel.name, inputs, outputs, isa, flops, seconds)

    # -- layers and rules ------------------------------------------------------------------------

    def _add(
        self,
        library: str,
        kernel: str,
        inputs: Sequence[Tensor],
        outputs: Sequence[Tensor],
        isa: str | None,
        flops: int | None,
        seconds: float,
    ) -> None:
        layer, decisions, rewrites = self._caller()
        rules = self._rules_of(layer, decisions, library == "ours")
        in_int8 = any(t.dtype == torch.int8 for t in inputs)  # weights of linear layers
        dtype = str(torch.int8 if in_int8 else outputs[0].dtype).removeprefix("torch.")
        read, made = ([tuple(t.shape) for t in tensors] for tensors in (inputs, outputs))
        call = TracedCall(layer, library, kernel, read, made, dtype, isa, rules, flops, seconds)
        call.rewrites = rewrites
        self.traced.append(call)

    def _rules_of(self, layer: str, decisions: Sequence[Decision], is_ours: bool) -> list[Decision]:
        """The rules behind a call: evaluated just before it, or when weights were packed.

        A rule that refused a kernel explains all torch calls of the layer that follow. A rule that
        chose one does not: torch may still be called, say to copy the kernel's input.
        """
        pending = self._pending[layer]
        if pending and (is_ours or not pending[-1].answer):
            del self._pending[layer]
            self._rejected[layer] = [] if pending[-1].answer else pending
            return pending
        if not is_ours and self._rejected.get(layer):
            return self._rejected[layer]
        return [*decisions] if is_ours or not all(d.answer for d in decisions) else []

    def _note_rule(self, decision: Decision) -> None:
        layer, *_ = self._caller()
        if decision not in self._pending[layer]:
            self._pending[layer].append(decision)

    def _caller(self) -> tuple[str, Sequence[Decision], tuple[str, ...]]:
        """The path of the calling layer, the rules behind it, and the rewrites of its step."""
        for caller in callers():
            if isinstance(caller, Operator):
                decisions = getattr(caller.function, "decisions", caller.decisions)
                return caller.path, decisions, caller.rewrites
            if found := self._modules.get(id(caller)):
                return found[0], getattr(found[1], "decisions", ()), ()
        return "", (), ()


def _computes(
    operator: OpOverload, args: Any, kwargs: dict[str, Any], outputs: Sequence[Tensor]
) -> bool:
    """Whether an operator does more than make views or allocate memory."""
    if not outputs or allocates(operator):
        return False
    # Tensors packed by oneDNN do not expose their memory; they are never views.
    given = {t.untyped_storage().data_ptr() for t in tensors_in((args, kwargs)) if not t.is_mkldnn}
    if any(t.is_mkldnn or t.untyped_storage().data_ptr() not in given for t in outputs):
        return True
    return operator._schema.is_mutable


def _short(operator: OpOverload) -> str:
    name: str = operator.overloadpacket.__name__
    return name.strip("_").removesuffix("_pointwise") if operator.namespace == "mkldnn" else name


# -- profiles --------------------------------------------------------------------------------------


@dataclass
class Profile:
    """The result of :func:`profile`.

    Attributes:
        calls: in execution order; ``seconds`` are medians.
        seconds: median time of the whole network, run without timing its calls.
        graph, plan: of the replays; None if the network is not replayed.
        obstacle: why a network that supports replay is not replayed.
        doors: what ``describe`` says of the network's calls.
    """

    calls: list[TracedCall]
    seconds: float
    graph: Graph | None = None
    plan: MemoryPlan | None = None
    obstacle: str | None = None
    doors: list[str] = field(default_factory=list)


@torch.inference_mode()
def profile(
    network: nn.Module,
    x: Tensor,
    repeats: int,
    describe: Callable[[nn.Module], list[str]] = lambda _: [],
) -> Profile:
    """Time a network in eval mode, alternating between runs as a whole and runs call by call.

    The state of its modules (mode, packed weights, graphs) is restored afterwards.
    """
    with _state_restored(network):
        for module in network.modules():
            module.training = False
            if isinstance(module, Replayed):
                module.forget()
        obstacle = None
        for _ in range(_CALLS):
            network(x)
        doors = describe(network)
        if isinstance(network, Replayed):
            recorded = network._calls
            assert recorded is not None
            if network.is_replayed:
                forward: Any = type(network).stands_for.forward  # type: ignore[attr-defined]
                found = _of_replays(network, recorded.graph(network, forward, x), x, repeats)
                found.doors = doors
                return found
            obstacle = "; ".join(door.reason for door in recorded.doors())

        def traced() -> list[TracedCall]:
            with Trace(x, network) as trace:
                network(x)
            return trace.traced

        calls = traced()
        total = _measure(calls, lambda: network(x), lambda: [c.seconds for c in traced()], repeats)
        return Profile(calls, total, obstacle=obstacle, doors=doors)


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


def _of_replays(
    network: Replayed, program: Callable[[Tensor], Any], x: Tensor, repeats: int
) -> Profile:
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
