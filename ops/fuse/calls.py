"""Calls of fused modules, and the door that each kind of call takes.

A kind of call is a method with arguments of given shapes, strides, dtypes and constants, in given
modes. Its first two calls are recorded, and run as they would without ``fuse()``. If both did the
same and nothing else changed, the third runs the rewritten operators and is captured, and later
ones are replayed, for as long as what :mod:`ops.fuse.guards` watches holds. Kinds that differ in
the sizes of tensors alone share one graph where :mod:`ops.fuse.sizes` knows that it is right. What
can't be proved so takes the second door, torch's Dynamo (:mod:`ops.fuse.dynamo`), and what is not
faster there runs plainly.
"""

from __future__ import annotations

import gc
import itertools
import logging
import random
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from types import CodeType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ops.cpu.call.dispatch import is_plain_call
from ops.fuse.guards import Guards
from ops.fuse.record import Recording, clock, record
from ops.fuse.sizes import SIZES_RECORDED, Group, Size, SizedGraph
from ops.fuse.structure import Structure, is_constant, take_apart
from ops.inference.layers import FastLayer
from ops.inference.packed_linear import Quantization, quantization_of
from ops.replay.capture import Capture
from ops.replay.graph import NotCapturableError
from ops.replay.replay import Replay
from ops.rewriting.graph import OperatorGraph
from ops.rewriting.rewrite import rewrite

__all__ = ["CALLS_TO_REPLAY", "Calls", "Door", "is_part"]

_log = logging.getLogger(__name__)

CALLS_TO_REPLAY = 3  # of a kind: two are recorded, which give plain results, and one is captured

MEASURES = (
    True  # whether doubtful kinds of calls are timed; without, replays are taken to be faster
)
_MOST_BYTES = 64 << 20  # of what is remembered of a module's calls, besides weights
_BYTES_OF_A_KIND = 4 << 10
_KINDS_BETWEEN_COUNTS = 16  # of their memory
_MOST_GROUPS = 16  # of kinds of calls that differ in sizes alone
_MOST_ATTEMPTS = 3  # to record a kind of call that changed something
_FEW_CHANGES = 2  # of a module, after which it is recorded again at once
_LONGEST_PAUSE = 64  # calls before a module that keeps changing is recorded again
_REPLAYS_TIMED = 2  # before they are compared with the time of the operators
_WORTH_CAPTURING = 5e-3  # seconds of a call
_AS_FAST = 1.02  # times a plain call's time
_CLEARLY = 0.9  # times what a plain call's operators took as they were recorded, which slows them
# Calls of a size after which more are to be expected than it takes to make up for the time of a
# recording, or of a capture.
_CALLS_TO_PAY = 8
_TOLERANCES = {torch.bfloat16: 3e-2, torch.float16: 4e-3}  # of a prediction; else 1e-4
_TURNS = 3  # of plain calls and replays each, where these don't seem faster


class _Thread(threading.local):
    is_whole: bool = False  # whether networks inside of one run as its layers
    is_weighed: bool = False  # whether a network's parts wait with Dynamo, which it may take itself


_thread = _Thread()


def is_part() -> bool:
    """Whether a network around this one runs as a whole in this thread."""
    return _thread.is_whole


@contextmanager
def _as_a_whole() -> Iterator[None]:
    """Context in which networks inside of one run as its layers."""
    before, _thread.is_whole = _thread.is_whole, True
    try:
        yield
    finally:
        _thread.is_whole = before


@contextmanager
def _without_collections() -> Iterator[None]:
    """Context in which Python does not look for garbage.

    What is made of a call would be reason to look through everything, which takes longer than the
    rest, and what ``gc.callbacks`` do would count as done by the call.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class Door:
    """How a kind of call runs.

    Attributes:
        call: the method and its arguments.
        name: ``recorded``, ``dynamo``, ``plain``, or ``watched``, until that is decided.
        reason: why it is not ``recorded``.
    """

    def __init__(self, call: str, name: str, reason: str) -> None:
        self.call, self.name, self.reason = call, name, reason

    def __str__(self) -> str:
        return f"{self.call}: {self.name}{self.reason and f' ({self.reason})'}"


class _Kind:
    """A kind of call.

    Attributes:
        name: of the method.
        step: what the next call does.
        attempts: recordings that proved nothing.
        recording, guards: the last one, and what must hold for it.
        seconds: what the operators of a plain call take.
        is_decided: whether replays are known to be faster.
        group, sizes: of the inputs, and the calls that differ from it in sizes alone.
        graph, size: what such calls have in common, and what depends on the size.
        used: the last call's number.
    """

    def __init__(self, name: str, step: Callable[..., Any]) -> None:
        self.name, self.step = name, step
        self.door, self.reason = "watched", ""
        self.attempts = self.calls = self.compilations = 0
        self.recording: Recording | None = None
        self.guards: Guards | None = None
        self.seconds = 0.0
        self.replay: Replay | None = None
        self.form: _Form | None = None  # of what the replay gives
        self.compiled: Any = None  # by Dynamo
        self.trial, self.is_decided = _Trial(), False
        self.group = Group()
        self.sizes: tuple[int, ...] = ()
        self.graph: SizedGraph | None = None
        self.size: Size | None = None
        self.used = 0

    @property
    def nbytes(self) -> int:
        """The memory that it takes."""
        replay = 0 if self.replay is None else self.replay.nbytes
        return _BYTES_OF_A_KIND + replay + (0 if self.size is None else self.size.nbytes)

    def replayed(self, module: Any, call: _Call) -> Any:
        """A call's result by the replay."""
        replay, form = self.replay, self.form
        if replay is None or form is None:  # another thread has just found plain calls faster
            return call.run(module)
        return form(replay(*call.tensors), call.tensors)


class _Trial:
    """Whether a faster way is one, by the times of calls: of ours and of plain ones."""

    def __init__(self) -> None:
        self.ours: list[float] = []
        self.plain: list[float] = []

    def is_ours(self, floor: float) -> bool:
        """Whether the next call is one of ours."""
        ours, plain = self.ours, self.plain
        if len(ours) < _REPLAYS_TIMED or min(ours) <= floor:
            return True
        return len(plain) > len(ours) - _REPLAYS_TIMED

    def verdict(self, floor: float) -> bool | None:
        """Whether ours are faster, once it is known.

        Args:
            floor: what a plain call takes at least.
        """
        ours, plain = self.ours, self.plain
        if len(ours) >= _REPLAYS_TIMED and min(ours) <= floor:
            return True
        if len(plain) < _TURNS or len(ours) < _REPLAYS_TIMED + _TURNS:
            return None
        return min(ours) <= _AS_FAST * min(plain)


def _measures() -> bool:
    """Whether times may decide how a call runs, and so the last bits of results."""
    return MEASURES and not torch.are_deterministic_algorithms_enabled()


class Calls:
    """The calls of a module. Holds no reference to it, to avoid a cycle.

    Args:
        second_door: gives :mod:`ops.fuse.dynamo`, for calls that prove nothing. Without it, the
            module is a function of its arguments, as Dynamo's graphs are, and one recording proves
            what it does.
    """

    def __init__(self, second_door: Callable[[], Any] | None = None) -> None:
        self._is_pure, self._second_door = second_door is None, second_door
        self._kinds: dict[Hashable, _Kind] = {}
        self._guards: Guards | None = None
        self._outlines: list[Any] = []  # of proved recordings
        self._layers: dict[Hashable, list[Any]] = {}  # that programs share
        self._lock = threading.Lock()  # of recordings
        self._code: dict[CodeType, dict[str, Any]] = {}  # that ran, with its globals
        self._restarts = 0
        self._pause = 0  # calls that run plainly before one is recorded
        self._groups: dict[Hashable, Group] = {}
        self._waits = False  # whether a kind must come back to be recorded
        self._number = itertools.count()  # of calls
        self._ran: dict[CodeType, dict[str, Any]] = {}  # of calls that prove nothing, too

    def graph(self, module: Any, method: Callable[..., Any], *args: Any) -> OperatorGraph:
        """The operators of a call, rewritten.

        Raises:
            NotCapturableError: it can't be recorded.
        """
        call = _Call(method, args, {}, None)
        with _as_a_whole():
            _, recording = record(lambda: call.run(module), call.tensors, *_names(module))
        if recording.graph is None:
            raise NotCapturableError(recording.failure or "")
        rewrite(recording.graph)
        _share_layers(recording.graph, self._layers)
        return recording.graph

    def doors(self) -> list[Door]:
        """The door of each kind of call that occurred."""
        return [Door(kind.name, kind.door, kind.reason) for kind in [*self._kinds.values()]]

    def __call__(
        self,
        module: Any,
        method: Callable[..., Any],
        args: Any,
        kwargs: dict[str, Any],
        also: Hashable = None,
    ) -> Any:
        """``method(module, *args, **kwargs)``, replayed if possible.

        Args:
            also: what tells the call from others besides its arguments.
        """
        if torch._C._len_torch_function_stack():
            return module.run(method, *args, **kwargs)
        call = _Call(method, args, kwargs, also)
        if not call.is_plain:
            return module.run(method, *args, **kwargs)
        kind = self._kinds.get(call.key)
        if kind is None:
            kind = self._add(call)
        kind.used = next(self._number)
        return kind.step(self, kind, module, call)

    def _add(self, call: _Call) -> _Kind:
        if len(self._kinds) % _KINDS_BETWEEN_COUNTS == 0:
            self._drop()
        shapes = ", ".join("×".join(map(str, t.shape)) for t in call.tensors)
        kind = _Kind(f"{call.method.__name__}({shapes})", Calls._record)
        if call.obstacle:
            self._fail(kind, call.obstacle)
        else:
            kind.group, kind.sizes = self._group(call.group), call.sizes
            self._begin(kind)
        self._kinds[call.key] = kind
        return kind

    def _group(self, key: Hashable) -> Group:
        if key not in self._groups and len(self._groups) >= _MOST_GROUPS:
            # Hardly any call is repeated.
            self._waits |= not any(k.replay is not None for k in [*self._kinds.values()])
            self._forget()
        return self._groups.setdefault(key, Group())

    def _begin(self, kind: _Kind) -> None:
        """Choose what the first call of a kind does."""
        group = kind.group
        if group.is_slow:
            self._run_plainly(kind, "plain calls are faster than one graph of every size")
            kind.step = Calls._wholly
        elif (found := group.proved(kind.sizes)) is not None:
            self._interpret_from_now_on(kind, found, "Python reads no size")
        elif self._waits or (group.is_settled and not group.lacks(kind.sizes)):
            kind.step, kind.reason = Calls._wait, group.reason

    def _interpret_from_now_on(
        self, kind: _Kind, found: tuple[SizedGraph, Size], reason: str
    ) -> None:
        kind.graph, kind.size = found
        kind.guards, kind.recording, kind.calls = self._guards, None, 0
        kind.step, kind.is_decided = Calls._interpret, True
        kind.door, kind.reason = "recorded", f"one graph of every size: {reason}"

    def _drop(self) -> None:
        """If there are too many kinds of calls, forget those that are longest past."""
        kinds = [*self._kinds.items()]
        left = sum(kind.nbytes for _, kind in kinds)
        if left <= _MOST_BYTES:
            return
        for key, kind in sorted(kinds, key=lambda item: item[1].used):
            if left <= _MOST_BYTES // 2:
                break
            left -= kind.nbytes
            self._kinds.pop(key, None)

    def _forget(self) -> None:
        self._kinds.clear()
        self._groups.clear()
        self._layers.clear()
        self._outlines.clear()

    def _holds(self, guards: Guards | None) -> bool:
        """Whether nothing has changed; otherwise, everything is forgotten."""
        if guards is not None and guards.hold():
            return True
        if guards is not None and guards is self._guards:
            self._forget()
            self._guards = None
            self._restarts += 1
            if self._restarts > _FEW_CHANGES:
                self._pause = min(2 ** (self._restarts - _FEW_CHANGES), _LONGEST_PAUSE)
        return False

    def _anew(self, kind: _Kind, module: Any, call: _Call) -> Any:
        """A call of a kind of which something changed."""
        if self._kinds.get(call.key) is kind:
            del self._kinds[call.key]
        return self(module, call.method, call.args, call.kwargs, call.also)

    # -- steps: what a call does -----------------------------------------------------------------

    def _wait(self, kind: _Kind, module: Any, call: _Call) -> Any:
        """Run a call plainly, and record the next one if it came back often enough."""
        kind.calls += 1
        if kind.calls >= _CALLS_TO_PAY:
            kind.step = Calls._record
        return call.plainly(module)

    def _wholly(self, kind: _Kind, module: Any, call: _Call) -> Any:
        return call.plainly(module)

    def _plainly(self, kind: _Kind, module: Any, call: _Call) -> Any:
        return call.run(module)  # with recordings of the networks inside

    def _record(self, kind: _Kind, module: Any, call: _Call) -> Any:
        """Record a call."""
        if self._pause > 0:
            self._pause -= 1
            return call.plainly(module)
        if not self._lock.acquire(blocking=False):
            return call.plainly(module)
        try:
            with _without_collections():
                return self._record_now(kind, module, call)
        finally:
            self._lock.release()

    def _record_now(self, kind: _Kind, module: Any, call: _Call) -> Any:
        guards = self._guards
        if not self._holds(guards):
            guards = self._guards = Guards(None if self._is_pure else module)
            guards.watch_code(self._code)
            kind.recording = None
            self._kinds.setdefault(call.key, kind)
        assert guards is not None
        if guards.failure is not None:  # perhaps for now, as of layers without weights yet
            self._guards = None
            self._try_again(kind, guards.failure)
            return call.plainly(module)
        if self._is_pure:  # before they are read
            guards.watch(module.weights.values())
        if call.needs_plain(guards):
            return call.plainly(module)
        before = _random_state()
        call.note_attributes()
        paths, quantized = _names(module)
        sees_sizes = kind.group.sees_sizes and not _has_fast_paths(module)
        with _as_a_whole():
            result, recording = record(
                lambda: call.run(module), call.tensors, paths, quantized, sees_sizes=sees_sizes
            )
        kind.seconds = min(kind.seconds or recording.seconds, recording.seconds)
        self._judge(kind, call, guards, recording, before)
        if quantized and recording.failure is None:  # which is asked for from the first call on
            result = self._computed(kind, recording, call, result)
        if kind.recording is recording:
            try:
                self._join_sizes(kind, recording, call, result)
            except Exception as error:  # the call has its result, and its kind goes on alone
                kind.group.fail(_reason(error))
        return result

    def _join_sizes(self, kind: _Kind, recording: Recording, call: _Call, result: Any) -> None:
        """Let calls of other sizes learn from a recording, and this one from theirs."""
        group = kind.group
        found = group.predicted(kind.sizes, recording)
        if found is None:
            case = group.add(kind.sizes, recording)
            if case is None:
                return
            if not self._is_pure and recording.outline not in self._outlines:
                self._outlines.append(recording.outline)  # two sizes prove as much as two calls
                kind.step = Calls._capture
            if len(case) < SIZES_RECORDED:
                return
            case.join(self._rewritten)
            found = group.predicted(kind.sizes, recording)
            if found is None:
                return
        graph, size = found
        if not _agree(self._computed_by(graph, size, call), result):
            group.fail("the graph of several sizes gave another result")
            return
        if not group.is_timed and _measures():  # now that weights are packed
            now = clock()
            begin = now()
            self._computed_by(graph, size, call)
            group.is_timed, group.is_slow = True, now() - begin > kind.seconds
        if group.is_slow:
            return
        self._interpret_from_now_on(kind, found, "its first call agreed with it")

    def _computed_by(self, graph: SizedGraph, size: Size, call: _Call) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            results = graph(size, *call.tensors)
        structure = graph.structure(size, results)
        return _Form(results, structure, call.tensors)(results, call.tensors)

    def _judge(
        self, kind: _Kind, call: _Call, guards: Guards, recording: Recording, random_state: Any
    ) -> None:
        """What a recording proves."""
        if not self._is_pure:
            self._ran |= recording.frames
        changed = not guards.hold()
        if changed:  # what was proved of other calls is so no more
            self._forget()
            self._kinds[call.key] = kind
            self._guards = None
        if recording.failure is None:
            if _random_state() != random_state:
                recording.fail("it draws random numbers")
            elif _modes() != call.modes:
                recording.fail("it changes a mode of torch")
            elif not call.is_intact():
                recording.fail("it changes its arguments")
        if recording.failure is not None and not changed:
            self._fail(kind, recording.failure)
            return
        previous, kind.recording = kind.recording, None
        if changed or recording.failure is not None:
            self._try_again(kind, recording.failure or "a call changes the module")
            return
        is_proved = self._is_pure or recording.outline in self._outlines
        if not is_proved and previous is not None:
            if recording.signature != previous.signature:
                self._try_again(kind, "calls differ")
                kind.recording = recording
                return
            is_proved = True
        if not self._is_pure:
            self._code |= recording.frames
            guards.watch_code(recording.frames)
        guards.watch(recording.constants)
        if guards.failure is not None:
            self._fail(kind, guards.failure)
            return
        kind.recording, kind.guards = recording, guards
        if is_proved:
            if recording.outline not in self._outlines:
                self._outlines.append(recording.outline)
            kind.step = Calls._capture

    def _try_again(self, kind: _Kind, reason: str) -> None:
        kind.attempts, kind.reason = kind.attempts + 1, reason
        if kind.attempts >= _MOST_ATTEMPTS:
            self._fail(kind, reason)

    def _capture(self, kind: _Kind, module: Any, call: _Call) -> Any:
        """Run the rewritten operators and capture what they call."""
        guards, recording = kind.guards, kind.recording
        if not self._holds(guards):
            return self._anew(kind, module, call)
        assert guards is not None and recording is not None
        if call.needs_plain(guards) or not self._lock.acquire(blocking=False):
            return call.plainly(module)
        try:
            with _without_collections():
                graph = self._rewritten(recording)
                with Capture(*call.tensors) as capture:
                    results = graph(*call.tensors)
            replay = Replay(capture.finish(results))
            form = _Form(results, recording.structure, call.tensors)
        except Exception as error:
            self._fail(kind, _reason(error))
            return call.plainly(module)
        finally:
            self._lock.release()
        if not self._holds(guards):  # a weight was changed while others were packed
            return self._anew(kind, module, call)
        kind.recording, kind.replay, kind.form, kind.step = None, replay, form, Calls._replay
        kind.door, kind.reason = "recorded", ""
        return form(results, call.tensors)

    def _interpret(self, kind: _Kind, module: Any, call: _Call) -> Any:
        """Run the graph of every size; a size that comes back is captured."""
        guards, graph, size = kind.guards, kind.graph, kind.size
        if not self._holds(guards):
            return self._anew(kind, module, call)
        assert guards is not None and graph is not None and size is not None
        if call.needs_plain(guards):
            return call.plainly(module)
        kind.calls += 1
        captures = kind.calls > _CALLS_TO_PAY and self._lock.acquire(blocking=False)
        try:
            if captures:
                with _without_collections(), Capture(*call.tensors) as capture:
                    results = graph(size, *call.tensors)
                replay = Replay(capture.finish(results))
            else:
                with torch._C._AutoDispatchBelowAutograd():
                    results = graph(size, *call.tensors)
            form = kind.form
            if form is None:
                form = _Form(results, graph.structure(size, results), call.tensors)
        except Exception as error:
            self._run_plainly(kind, _reason(error))
            return call.plainly(module)
        finally:
            if captures:
                self._lock.release()
        if kind.form is None or captures:
            if not self._holds(guards):  # a weight was changed while others were packed
                return self._anew(kind, module, call)
            kind.form = form
        if captures:
            kind.replay, kind.step = replay, Calls._replay
        return form(results, call.tensors)

    def _rewritten(self, recording: Recording) -> OperatorGraph:
        graph = recording.graph
        assert graph is not None
        if not recording.is_rewritten:
            recording.is_rewritten = True
            rewrite(graph)
            _share_layers(graph, self._layers)
        return graph

    def _computed(self, kind: _Kind, recording: Recording, call: _Call, plain: Any) -> Any:
        """The result of a call by the rewritten operators, in place of the plain one."""
        try:
            results = self._rewritten(recording)(*call.tensors)
            return _Form(results, recording.structure, call.tensors)(results, call.tensors)
        except Exception as error:
            self._fail(kind, _reason(error))
            return plain

    def _replay(self, kind: _Kind, module: Any, call: _Call) -> Any:
        guards = kind.guards
        if not self._holds(guards):
            return self._anew(kind, module, call)
        assert guards is not None
        if call.needs_plain(guards):
            return call.plainly(module)
        if kind.is_decided or not _measures():
            return kind.replayed(module, call)
        return self._try(kind, module, call)

    def _try(self, kind: _Kind, module: Any, call: _Call) -> Any:
        """Replay or run a call, and learn which is faster."""
        floor = _CLEARLY * kind.seconds
        is_ours = kind.trial.is_ours(floor)
        now = clock()
        begin = now()
        result = kind.replayed(module, call) if is_ours else call.plainly(module)
        (kind.trial.ours if is_ours else kind.trial.plain).append(now() - begin)
        verdict = kind.trial.verdict(floor)
        if verdict:
            kind.is_decided = True
        elif verdict is not None:
            self._run_plainly(kind, "plain calls are faster than replays")
        return result

    # -- other doors -----------------------------------------------------------------------------

    def _fail(self, kind: _Kind, reason: str) -> None:
        """Note why a kind of call is not recorded: it takes the next door."""
        kind.recording = None
        self._run_plainly(kind, reason)
        if not self._is_pure and _measures():
            kind.step, kind.door = Calls._weigh, "watched"

    def _weigh(self, kind: _Kind, module: Any, call: _Call) -> Any:
        """Time a plain call and some in which parts are recorded, which Dynamo has to beat."""
        if _thread.is_weighed:
            return call.run(module)
        plain, parts = kind.trial.plain, kind.trial.ours
        now = clock()
        begin = now()
        if not plain:
            result = call.plainly(module)
        else:
            _thread.is_weighed = True
            try:
                result = call.run(module)
            finally:
                _thread.is_weighed = False
        (parts if plain else plain).append(now() - begin)
        if plain[0] < _WORTH_CAPTURING:  # which Dynamo, after seconds, could speed up
            self._run_plainly(kind, kind.reason)
        elif len(parts) > CALLS_TO_REPLAY + 1:
            kind.seconds = min(*plain, *parts[CALLS_TO_REPLAY:])
            kind.step, kind.trial = Calls._through_dynamo, _Trial()
        return result

    def _through_dynamo(self, kind: _Kind, module: Any, call: _Call) -> Any:
        """Let Dynamo capture a call, and learn whether that is faster."""
        if _thread.is_weighed:
            return call.run(module)
        assert self._second_door is not None
        dynamo = self._second_door()
        if dynamo.unavailable_reason() is not None:
            self._run_plainly(kind, kind.reason)
            return call.plainly(module)
        if torch.is_grad_enabled() and any(t.requires_grad for t in module.parameters()):
            return call.plainly(module)
        compiled = kind.compiled
        if compiled is None or not compiled.guards.hold():
            kind.door, kind.calls = "watched", 0
            kind.compilations += compiled is not None
            compiled = kind.compiled = dynamo.compiled(call.method, module, self._ran)
            obstacle = compiled.obstacle
            if kind.compilations >= _MOST_ATTEMPTS:
                obstacle = "what its code refers to changes"
            if obstacle is not None:
                self._run_plainly(kind, f"{kind.reason}; {obstacle}")
        if kind.compiled is None or call.needs_plain(compiled.guards):
            return call.plainly(module)
        if kind.door == "dynamo":
            return module.run(compiled, *call.args, **call.kwargs)
        before, now = compiled.graphs, clock()
        begin = now()
        result = module.run(compiled, *call.args, **call.kwargs)
        seconds = now() - begin
        kind.calls += 1
        if compiled.graphs != before:
            kind.compilations += 1
            if kind.compilations >= _MOST_ATTEMPTS:
                self._run_plainly(kind, f"{kind.reason}; Dynamo captures each call anew")
        elif kind.calls > _MOST_ATTEMPTS:  # recorded, captured and replayed by now
            kind.trial.ours.append(seconds)
            verdict = kind.trial.verdict(kind.seconds)
            if verdict:
                kind.door = "dynamo"
            elif len(kind.trial.ours) > _REPLAYS_TIMED:
                self._run_plainly(kind, f"{kind.reason}; Dynamo's graphs are not faster")
        return result

    def _run_plainly(self, kind: _Kind, reason: str) -> None:
        _log.debug("%s runs plainly: %s", kind.name, reason)
        kind.door, kind.reason, kind.step, kind.replay = "plain", reason, Calls._plainly, None
        kind.compiled = None


class _Call:
    """The arguments of one call.

    Attributes:
        tensors: those among them, each once.
        key: what tells calls of this kind from others.
        is_plain: whether it may be recorded now: no compiler, tracer or other mode is active.
        obstacle: what about the arguments keeps it from being recorded.
    """

    def __init__(
        self, method: Callable[..., Any], args: Any, kwargs: dict[str, Any], also: Hashable
    ) -> None:
        self.method, self.args, self.kwargs, self.also = method, args, kwargs, also
        self.obstacle = ""
        structure: Any = None  # of the usual call, for which pytree takes too long
        described: Any
        if len(args) == 1 and not kwargs and type(args[0]) is Tensor:
            (x,) = self.tensors = [args[0]]
            described = x.shape, x.stride(), x.dtype, x.requires_grad
        else:
            leaves, structure = pytree.tree_flatten((args, kwargs))
            self.tensors, self._leaves, self._structure = [], leaves, structure
            described = tuple(map(self._describe, leaves))
            self._check_memory()
        self.is_plain = is_plain_call(self.tensors)
        self.modes = _modes()
        self.key = (method.__name__, structure, described, self.modes, also)

    def _describe(self, leaf: Any) -> Hashable:
        if isinstance(leaf, Tensor):
            for index, other in enumerate(self.tensors):
                if other is leaf:
                    return index
            self.tensors.append(leaf)
            return leaf.shape, leaf.stride(), leaf.dtype, leaf.requires_grad
        if is_constant(leaf):
            return (type(leaf), repr(leaf) if isinstance(leaf, float | complex) else leaf)
        self.obstacle = self.obstacle or f"an argument is a {type(leaf).__name__}"
        return type(leaf).__qualname__, id(type(leaf))

    @property
    def sizes(self) -> tuple[int, ...]:
        """All sizes of all tensors."""
        return tuple(n for t in self.tensors for n in t.shape)

    @property
    def group(self) -> Hashable:
        """What tells this call from all those that don't differ in sizes alone."""
        _, structure, _, modes, also = self.key
        leaves = getattr(self, "_leaves", self.args)
        numbers = {id(t): number for number, t in enumerate(self.tensors)}
        described = tuple(
            (numbers[id(leaf)], leaf.ndim, _layout(leaf), leaf.dtype, leaf.requires_grad)
            if isinstance(leaf, Tensor)
            else self._describe(leaf)
            for leaf in leaves
        )
        return self.method.__name__, structure, described, modes, also

    def _check_memory(self) -> None:
        if not self.tensors:
            self.obstacle = self.obstacle or "no argument is a tensor"
        elif self.tensors[1:] and all(t.layout == torch.strided for t in self.tensors):
            memory = {t.untyped_storage()._cdata for t in self.tensors}
            if len(memory) < len(self.tensors):
                self.obstacle = self.obstacle or "arguments share memory"

    def run(self, module: Any) -> Any:
        """The call as it is."""
        return module.run(self.method, *self.args, **self.kwargs)

    def plainly(self, module: Any) -> Any:
        """The call as it would be without ``fuse()``."""
        with _as_a_whole():
            return self.run(module)

    def needs_plain(self, guards: Guards) -> bool:
        """Whether autograd must see the call, or an argument is something that the module knows."""
        if any(id(t) in guards.identities for t in self.tensors):
            return True
        if not torch.is_grad_enabled():
            return False
        return any(t.requires_grad for t in self.tensors) or guards.needs_gradients()

    def note_attributes(self) -> None:
        """Remember what :meth:`is_intact` compares."""
        self._vars = [dict(vars(t)) for t in self.tensors]

    def is_intact(self) -> bool:
        """Whether arguments have the attributes, and containers hold what they held."""
        if any(vars(t) != before for t, before in zip(self.tensors, self._vars, strict=True)):
            return False
        if not hasattr(self, "_leaves"):
            return True
        leaves, structure = pytree.tree_flatten((self.args, self.kwargs))
        same = len(leaves) == len(self._leaves) and structure == self._structure
        return same and all(a is b for a, b in zip(leaves, self._leaves, strict=True))


def _layout(t: Tensor) -> Hashable:
    """The order of a tensor's axes in memory; the strides of one with gaps."""
    if t.is_contiguous():
        return "contiguous"
    memory_format = {4: torch.channels_last, 5: torch.channels_last_3d}.get(t.ndim)
    if memory_format is not None and t.is_contiguous(memory_format=memory_format):
        return memory_format
    return t.stride()


def _has_fast_paths(module: Any) -> bool:
    """Whether layers inside take another path where functions of torch are seen."""
    kinds = nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerEncoder
    return any(isinstance(inner, kinds) for _, inner in module.named_modules())


def _agree(given: Any, plain: Any) -> bool:
    """Whether two results of a call are equal up to rounding."""
    pairs = zip(take_apart(given)[1], take_apart(plain)[1], strict=True)
    return all(_is_close(a, b) for a, b in pairs)


def _is_close(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype or a.stride() != b.stride():
        return False
    if not a.dtype.is_floating_point:
        return torch.equal(a, b)
    tolerance = _TOLERANCES.get(a.dtype, 1e-4)
    largest = b.double().abs().nan_to_num(0, 0, 0).max().item()
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance * largest, equal_nan=True)


def _modes() -> Hashable:
    """What a forward may ask for besides its arguments."""
    return (
        torch.is_inference_mode_enabled(),
        torch.is_grad_enabled(),
        torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_num_threads(),
    )


class _Form:
    """The form and the memory format of a plain call's result.

    Args:
        results: of the rewritten operators, for these inputs.
        structure: of the plain call's.
    """

    def __init__(
        self, results: Sequence[Tensor], structure: Structure | None, inputs: Sequence[Tensor]
    ) -> None:
        assert structure is not None
        self._structure = structure
        # By plain memory: the parts that need a copy, since they have other strides, or memory in
        # common that plain ones don't have. Arguments are the first to have memory.
        self._copied: dict[int, list[tuple[int, tuple[int, ...], int]]] = {}
        self._alike: list[
            int
        ] = []  # which may be arguments or other parts, but aren't plain calls'
        owners = {_storage(t): number for number, t in enumerate(inputs, 1)}
        seen = {*owners.values()}
        parts = structure.varying
        for index, (t, part) in enumerate(zip(results, parts, strict=True)):
            own = owners.setdefault(_storage(t), part.memory) == part.memory
            if not own or not _has_strides(t, part.stride):
                self._copied[part.memory] = []
            elif part.memory in seen:
                self._alike.append(index)
            seen.add(part.memory)
        if any(memory <= len(inputs) for memory in self._copied):
            raise NotCapturableError("a result is a view of an argument in another memory format")
        for index, part in enumerate(parts):
            if part.memory in self._copied:
                self._copied[part.memory].append((index, part.stride, part.offset))

    def __call__(self, results: list[Tensor], inputs: Sequence[Tensor]) -> Any:
        """The result of a call from what the operators give for its inputs."""
        for parts in self._copied.values():
            if len(parts) == 1:
                ((index, stride, _),) = parts
                t = results[index]
                results[index] = torch.empty_strided(t.shape, stride, dtype=t.dtype).copy_(t)
            else:
                _copy_together(results, parts)
        for index in self._alike:
            results[index] = results[index].detach()
        return self._structure(results, inputs)


def _copy_together(
    results: list[Tensor], parts: Sequence[tuple[int, tuple[int, ...], int]]
) -> None:
    """Copy results into memory that they share, at the given strides and offsets."""
    begin = min(offset for *_, offset in parts)
    ends = [
        offset + sum(s * (n - 1) for s, n in zip(stride, results[i].shape, strict=True)) + 1
        for i, stride, offset in parts
    ]
    whole = torch.empty(max(ends) - begin, dtype=results[parts[0][0]].dtype)
    for i, stride, offset in parts:
        view = whole.as_strided(results[i].shape, stride, offset - begin)
        results[i] = view.copy_(results[i])


def _storage(t: Tensor) -> int:
    return t.untyped_storage()._cdata


def _has_strides(t: Tensor, stride: tuple[int, ...]) -> bool:
    """Whether a tensor has these strides, or others that only matter for overlapping ones."""
    if t.stride() == stride:
        return True
    return 0 in stride and any(n > 1 and not s for n, s in zip(t.shape, stride, strict=True))


def _names(module: Any) -> tuple[dict[int, str], dict[int, Quantization]]:
    """The paths of modules, and how layers with a weight compute in int8, by identity."""
    paths: dict[int, str] = {}
    quantized: dict[int, Quantization] = {}
    for path, inner in module.named_modules():
        paths[id(inner)] = path
        if (quantization := quantization_of(inner)) is not None:
            quantized[id(inner._parameters["weight"])] = quantization
    return paths, quantized


def _random_state() -> Any:
    numpy = np.random.get_state(legacy=False)["state"]
    return (
        random.getstate(),
        bytes(torch.get_rng_state().numpy()),
        bytes(numpy["key"]),
        numpy["pos"],
    )


def _reason(error: Exception) -> str:
    if isinstance(error, NotCapturableError):
        return str(error)
    return f"{type(error).__name__}: {error}"


def _share_layers(graph: OperatorGraph, made: dict[Hashable, list[Any]]) -> None:
    """Replace layers by equal ones of earlier programs, so that weights are packed once.

    Guards watch what they are made of.
    """
    for operator in graph.operators:
        layer: Any = operator.function
        if not isinstance(layer, nn.Module):
            continue
        for inner in layer.modules():
            if isinstance(inner, FastLayer):
                inner.is_watched = True
        alike = made.setdefault((type(layer), str(layer)), [])
        for other in alike:
            if _equal(layer, other):
                operator.function = other
                break
        else:
            alike.append(layer)


def _equal(layer: nn.Module, other: nn.Module) -> bool:
    tensors, others = layer.state_dict(), other.state_dict()
    if tensors.keys() != others.keys():
        return False
    return all(
        t.data_ptr() == others[name].data_ptr() or torch.equal(t, others[name])
        for name, t in tensors.items()
    )
