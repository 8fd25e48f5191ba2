"""Modules whose calls are captured once and then replayed without Python.

For a fused block of a small network, the overhead of Python and torch is as large as the
computation: kernels fill the caches with weights, so that each step in between misses them.
"""

from __future__ import annotations

import ctypes
import itertools
import logging
import sys
from collections.abc import Callable, Hashable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from ops.cpu.build import status
from ops.cpu.call.dispatch import kernels_apply
from ops.replay.capture import Capture
from ops.replay.changes import TensorSnapshot
from ops.replay.graph import NotCapturableError
from ops.replay.replay import Replay, unavailable

__all__ = ["Recorded", "recorded_form"]

_log = logging.getLogger(__name__)

_MOST_INPUTS = 16  # remembered combinations of shape, strides, dtype and threads
_FEW_CHANGES = 2  # of a module, after which it is captured again at once
_LONGEST_WAIT = 64  # calls before a module that keeps changing is captured again
_GLOBAL_HOOKS = torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks
_DICT_FUNCTIONS = ctypes.pythonapi.PyDict_Size, ctypes.pythonapi.PyDict_Next


class Recorded(nn.Module):
    """Mixin, placed before the class of a module, whose methods may pass calls to :meth:`recorded`.

    The first call with an input of a given shape, strides and dtype runs a program, the second is
    captured, and later calls replay the graph for as long as no submodule, attribute, parameter or
    hook has changed. After a change, and whenever gradients, hooks inside, compilation, tracing,
    profiling or autocast require it, the layers run eagerly. Programs and replays give the same
    bits; whatever else a layer does, such as counting its calls, a replay leaves out.
    """

    _records: _Records | None = None

    def recorded(
        self,
        x: Tensor,
        call: Callable[[Tensor], Any],
        key: Hashable = None,
        otherwise: Callable[[Tensor], Any] | None = None,
    ) -> Any:
        """``call(x)``, replayed if possible.

        Args:
            x: a plain tensor.
            call: runs the layers eagerly.
            key: tells calls from others with the same ``x``.
            otherwise: runs calls that cannot be replayed; default ``call``.
        """
        if self._records is None:
            self._records = _Records()
        return self._records(self, x, call, key, otherwise or call)

    @classmethod
    def methods_of(cls, kind: type[nn.Module]) -> dict[str, Any]:
        """The methods that :func:`recorded_form` adds to the form of ``kind``."""
        raise NotImplementedError

    def compute(self, x: Tensor) -> Any:
        """The network's own ``forward``."""
        raise NotImplementedError

    def program(self, x: Tensor, call: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
        """The callable captured for ``call``, with the same results.

        Raises:
            NotCapturableError: it cannot be replayed.
        """
        raise NotImplementedError

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

    def obstacle(self) -> str | None:
        """Why this module can never be replayed, or None; single calls may still run eagerly."""
        try:
            _Snapshot(self)
        except NotCapturableError as error:
            return str(error)
        return None

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()
        state.pop("_records", None)
        return state


_forms: dict[tuple[type[nn.Module], type[Recorded]], type[nn.Module]] = {}


def recorded_form(kind: type[nn.Module], recorded: type[Recorded]) -> type[nn.Module]:
    """A picklable subclass of ``recorded`` and ``kind`` under the name of ``kind``."""
    form = _forms.get((kind, recorded))
    if form is None:
        members = {
            **{name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")},
            **recorded.methods_of(kind),
            "stands_for": kind,  # see ops.inference.layers
            "__reduce_ex__": lambda self, _: (_restore, (kind, recorded), self.__getstate__()),
        }
        form = _forms[kind, recorded] = type(kind.__name__, (recorded, kind), members)
    return form


def _restore(kind: type[nn.Module], recorded: type[Recorded]) -> nn.Module:
    form = recorded_form(kind, recorded)
    return form.__new__(form)


class _Records:
    """The replays of a module by input. Holds no reference to the module, to avoid a cycle.

    Attributes:
        made: what programs may share, such as layers with packed weights.
    """

    def __init__(self) -> None:
        # A replay, a program that will be captured, the number of eager calls so far, or None if
        # calls cannot be captured.
        self._programs: dict[Hashable, Replay | Callable[[Tensor], Any] | int | None] = {}
        self._snapshot: _Snapshot | None = None
        self._wait = 0  # calls of a kind that run eagerly before one is recorded
        self._restarts = 0
        self.made: dict[Hashable, list[Any]] = {}

    def __call__(
        self,
        module: Recorded,
        x: Tensor,
        call: Callable[[Tensor], Any],
        which: Hashable,
        otherwise: Callable[[Tensor], Any],
    ) -> Any:
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
        self, module: Recorded, key: Hashable, x: Tensor, call: Callable[[Tensor], Any]
    ) -> Any:
        try:
            snapshot = self._snapshot or _Snapshot(module)
        except NotCapturableError as error:
            _log.debug("%s is not recorded: %s", type(module).__name__, error)
            self._note(key, -_LONGEST_WAIT)  # try again later: hooks may be removed
            return call(x)
        if snapshot.needs_gradients(x):
            return call(x)
        try:
            program = module.program(x, call)
        except NotCapturableError as error:
            _log.debug("%s is not recorded: %s", type(module).__name__, error)
            self._note(key, None)
            return call(x)
        result = program(x)
        if self._snapshot is None:
            self._snapshot = _Snapshot(module)  # weights have been packed meanwhile
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


class _Snapshot:
    """Everything that a module refers to, for detecting changes.

    Raises:
        NotCapturableError: hooks inside, or no kernel.
    """

    def __init__(self, module: Recorded) -> None:
        reason = unavailable()
        if reason is not None:
            raise NotCapturableError(reason)
        if not getattr(sys, "_is_gil_enabled", lambda: True)():
            raise NotCapturableError(
                "a free-threaded Python could change the module during the check"
            )
        # Through PyDLL, which holds the GIL.
        library = ctypes.PyDLL(str(status("replay").path))
        self._same_values, self._prefetch = library.replay_same_values, library.replay_prefetch
        modules = list(module.modules())
        for inner in modules[1:]:
            if inner._forward_hooks or inner._forward_pre_hooks:
                raise NotCapturableError(f"a {type(inner).__name__} has hooks")
        held = [d for m in modules for d in _dicts_of(m)]
        # An identity, as left behind by a folded layer, has no attribute that affects the result.
        counted = [vars(m) for m in modules if isinstance(m, nn.Identity)]
        compared = [*(vars(m) for m in modules if not isinstance(m, nn.Identity)), *held]
        compared += _GLOBAL_HOOKS
        values = [v for d in compared for v in d.values()]
        # Kept alive, so that ids are not reused. What refers to this snapshot is left out, to avoid
        # a cycle.
        self._kept = [
            *(d for d in (*compared, *counted) if d is not vars(module)),
            *(v for v in values if v is not module._records),
        ]
        counts = (*map(len, compared), *(-1 - len(d) for d in counted))
        self._arguments = (
            *(ctypes.cast(f, ctypes.c_void_p) for f in _DICT_FUNCTIONS),
            ctypes.c_int64(len(counts)),
            _words(map(id, (*compared, *counted))),
            _words(counts),
            _words(map(id, values)),
        )
        self._tensors = list(itertools.chain(module.parameters(), module.buffers()))
        if not kernels_apply(self._tensors):
            raise NotCapturableError("its parameters and buffers are not plain CPU tensors")
        self._tensor_snapshot = TensorSnapshot(self._tensors)
        of_tensors, of_dicts = map(_lines_of, self._tensors), map(_lines_of_dict, compared)
        lines = tuple(itertools.chain.from_iterable((*of_tensors, *of_dicts)))
        self._lines = ctypes.c_int64(len(lines)), _words(lines)

    def is_valid(self) -> bool:
        """Whether the module is unchanged."""
        # A call of a network leaves the caches full of weights. Fetched one after the other, what
        # tells changes took 8 % of the time of a MobileNetV3 in bfloat16.
        self._prefetch(*self._lines)
        return bool(self._same_values(*self._arguments)) and self._tensor_snapshot.unchanged()

    def needs_gradients(self, x: Tensor) -> bool:
        """Whether autograd must see a call with ``x``."""
        if not torch.is_grad_enabled():
            return False
        return x.requires_grad or any(t.requires_grad for t in self._tensors)


_IMPL_BYTES, _STORAGE_BYTES = 208, 128  # of torch's tensors and storages, about
_DICT_POINTERS = (32, 40)  # in CPython's dictionaries, to their entries


def _lines_of(tensor: Tensor) -> Iterable[int]:
    """The addresses of the cache lines that hold a tensor's version and place."""
    impl, storage = tensor._cdata, tensor.untyped_storage()._cdata
    yield id(tensor)
    yield from range(impl, impl + _IMPL_BYTES, 64)
    yield from range(storage, storage + _STORAGE_BYTES, 64)


def _lines_of_dict(held: dict[str, Any]) -> Iterable[int]:
    """The addresses of the cache lines that hold a dictionary's values."""
    yield id(held)
    for pointer in _DICT_POINTERS:
        begin = ctypes.c_void_p.from_address(id(held) + pointer).value
        if held and begin is not None:
            yield from range(begin, begin + held.__sizeof__() - _DICT_POINTERS[-1], 64)


def _dicts_of(module: nn.Module) -> tuple[Any, ...]:
    """The dictionaries of a module other than its attributes."""
    hooks = module._forward_hooks, module._forward_pre_hooks
    return module._parameters, module._buffers, module._modules, *hooks


def _words(numbers: Iterable[int]) -> Any:
    words = tuple(numbers)
    return (ctypes.c_int64 * len(words))(*words)
