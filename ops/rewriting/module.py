"""Modules of any package whose calls are recorded, rewritten and replayed.

For a fused block of a small network, the overhead of Python and torch is as large as the
computation: kernels fill the caches with weights, so that each step in between misses them.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ops.cpu.call.dispatch import is_plain_call
from ops.replay.capture import Capture
from ops.replay.changes import ModuleSnapshot
from ops.replay.graph import NotCapturableError
from ops.replay.replay import Replay
from ops.rewriting.graph import OperatorGraph
from ops.rewriting.recorder import record
from ops.rewriting.rewrite import rewrite

__all__ = ["Rewritten", "rewritten_form"]

_log = logging.getLogger(__name__)

_METHODS = ("forward", "forward_features", "forward_intermediates", "get_intermediate_layers")
_MOST_INPUTS = 16  # remembered combinations of shape, strides, dtype and threads
_FEW_CHANGES = 2  # of a module, after which it is captured again at once
_LONGEST_WAIT = 64  # calls before a module that keeps changing is captured again


class _Thread(threading.local):
    is_inside: bool = False  # a call that may be replayed as a whole
    is_recorded: bool = False  # such a call, now


_thread = _Thread()


@contextmanager
def _inside(*, is_recorded: bool) -> Iterator[None]:
    before = _thread.is_inside, _thread.is_recorded
    _thread.is_inside, _thread.is_recorded = True, is_recorded
    try:
        yield
    finally:
        _thread.is_inside, _thread.is_recorded = before


class Rewritten(nn.Module):
    """Mixin, placed before the class of a network, that rewrites and replays its calls.

    A call must get one tensor; its other arguments and what it returns may be anything. The first
    call of a kind (with an input of a given shape, strides and dtype) is recorded
    (:mod:`ops.rewriting.recorder`) and rewritten, the second captured, and later ones replay the
    graph for as long as no submodule, attribute, parameter or hook has changed; all give the same
    bits. Where hardly any call repeats the shape of another, those of new shapes run the network as
    it was, and so do calls with gradients, hooks inside, compilation, tracing, profiling or
    autocast. Whatever else a layer does, such as counting its calls, a replay leaves out.
    """

    _records: _Records | None = None

    def eagerly(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a method of the network's own class; not used while it is recorded."""
        return method(self, *args, **kwargs)

    def program(self, x: Tensor, call: Callable[[Tensor], Any]) -> OperatorGraph:
        """The callable captured for ``call``, with the same results.

        Raises:
            NotCapturableError: it cannot be replayed.
        """
        with _inside(is_recorded=True):
            graph = record(self, call, x)
        rewrite(graph)
        if self._records is not None:
            _share_layers(graph, self._records.made)
        return graph

    def forget(self) -> None:
        """Drop all graphs, so that calls are captured again."""
        self._records = None

    @property
    def is_replayed(self) -> bool:
        """Whether there is a graph to replay."""
        records = self._records
        return records is not None and any(
            isinstance(program, Replay) for program in records._programs.values()
        )

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()
        state.pop("_records", None)
        return state


_forms: dict[tuple[type[nn.Module], type[Rewritten]], type[nn.Module]] = {}


def rewritten_form(kind: type[nn.Module], mixin: type[Rewritten]) -> type[nn.Module]:
    """A picklable subclass of ``mixin`` and ``kind`` under the name of ``kind``."""
    form = _forms.get((kind, mixin))
    if form is None:
        members = {
            **{name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")},
            **{n: _dispatched(getattr(kind, n)) for n in _METHODS if hasattr(kind, n)},
            "stands_for": kind,  # see ops.inference.layers
            "__reduce_ex__": lambda self, _: (_restore, (kind, mixin), self.__getstate__()),
        }
        form = _forms[kind, mixin] = type(kind.__name__, (mixin, kind), members)
    return form


def _restore(kind: type[nn.Module], mixin: type[Rewritten]) -> nn.Module:
    form = rewritten_form(kind, mixin)
    return form.__new__(form)


def _dispatched(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of a network, replayed if possible."""

    @functools.wraps(method)
    def dispatched(self: Rewritten, *args: Any, **kwargs: Any) -> Any:
        if _thread.is_recorded:
            return method(self, *args, **kwargs)
        leaves: list[Any] = [*args]
        structure: Any = None  # of the usual call, for which pytree takes too long
        if len(args) != 1 or kwargs:
            leaves, structure = pytree.tree_flatten((args, kwargs))
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        if _thread.is_inside or len(places) != 1 or torch._C._len_torch_function_stack():
            return self.eagerly(method, *args, **kwargs)
        (place,) = places
        before, x, after = leaves[:place], leaves[place], leaves[place + 1 :]
        others = (*before, *after)
        if not is_plain_call((x,)) or not all(isinstance(leaf, Hashable) for leaf in others):
            return self.eagerly(method, *args, **kwargs)

        def plain(x: Tensor) -> Any:
            now, named = (x,), {}
            if structure is not None:
                now, named = pytree.tree_unflatten([*before, x, *after], structure)
            if _thread.is_recorded:
                return method(self, *now, **named)
            return self.eagerly(method, *now, **named)

        def call(x: Tensor) -> Any:
            with _inside(is_recorded=_thread.is_recorded):
                return plain(x)

        if self._records is None:
            self._records = _Records()
        return self._records(self, x, call, (method.__name__, structure, others), plain)

    return dispatched


class _Records:
    """The replays of a module by input. Holds no reference to the module, to avoid a cycle.

    Attributes:
        made: what programs may share, such as layers with packed weights.
    """

    def __init__(self) -> None:
        # A replay, a program that will be captured, the number of eager calls so far, or None if
        # calls cannot be captured.
        self._programs: dict[Hashable, Callable[[Tensor], Any] | int | None] = {}
        self._snapshot: ModuleSnapshot | None = None
        self._wait = 0  # calls of a kind that run eagerly before one is recorded
        self._restarts = 0
        self.made: dict[Hashable, list[Any]] = {}

    def __call__(
        self,
        module: Rewritten,
        x: Tensor,
        call: Callable[[Tensor], Any],
        which: Hashable,
        otherwise: Callable[[Tensor], Any],
    ) -> Any:
        """``call(x)``, replayed if possible.

        Args:
            call: runs the layers eagerly.
            which: tells calls from others with the same ``x``.
            otherwise: runs calls that cannot be replayed.
        """
        key = (x.shape, x.stride(), x.dtype, torch.get_num_threads(), which)
        program = self._programs.get(key, 0)
        if program is None:
            return otherwise(x)
        snapshot = self._snapshot
        if snapshot is not None and not snapshot.is_valid():
            self._restart()
            snapshot, program = None, 0
        if snapshot is not None and snapshot.needs_gradients(x):
            return call(x)
        if isinstance(program, Replay):
            return program(x)
        if not isinstance(program, int):
            return self._capture(key, x, program)
        if program >= self._wait:
            return self._start(module, key, x, call)
        self._note(key, program + 1)
        return call(x)

    def _note(self, key: Hashable, program: Callable[[Tensor], Any] | int | None) -> None:
        if key not in self._programs and len(self._programs) >= _MOST_INPUTS:
            if not any(isinstance(program, Replay) for program in self._programs.values()):
                self._wait = max(self._wait, 1)  # hardly any call is repeated
            self._programs.clear()
            self.made.clear()
        self._programs[key] = program

    def _start(
        self, module: Rewritten, key: Hashable, x: Tensor, call: Callable[[Tensor], Any]
    ) -> Any:
        wait: int | None = -_LONGEST_WAIT  # try again later: hooks may be removed
        try:
            snapshot = self._snapshot or ModuleSnapshot(module)
            if snapshot.needs_gradients(x):
                return call(x)
            wait = None
            program = module.program(x, call)
        except NotCapturableError as error:
            _log.debug("%s is not recorded: %s", type(module).__name__, error)
            self._note(key, wait)
            return call(x)
        result = program(x)
        if self._snapshot is None:
            self._snapshot = ModuleSnapshot(module)  # weights have been packed meanwhile
        self._note(key, program)
        return result

    def _capture(self, key: Hashable, x: Tensor, program: Callable[[Tensor], Any]) -> Any:
        snapshot = self._snapshot
        assert snapshot is not None
        with Capture(x) as capture:
            result = program(x)
        if not snapshot.is_valid():  # for example, weights were packed again
            self._restart()
            return result
        try:
            self._note(key, Replay(capture.finish(result)))
        except NotCapturableError as error:
            _log.debug("a call is not replayed: %s", error)
            self._note(key, None)
        return result

    def _restart(self) -> None:
        self._programs.clear()
        self.made.clear()
        self._snapshot = None
        self._restarts += 1
        if self._restarts > _FEW_CHANGES:
            self._wait = min(max(1, 2 * self._wait), _LONGEST_WAIT)


def _share_layers(graph: OperatorGraph, made: dict[Hashable, list[Any]]) -> None:
    """Replace layers by equal ones of earlier programs, so that weights are packed once."""
    for operator in graph.operators:
        layer: Any = operator.function
        if not isinstance(layer, nn.Module):
            continue
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
