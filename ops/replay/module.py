"""Pieces of networks whose calls are recorded, then repeated without Python.

A fused block of a small network takes Python and torch as long to call as it takes to compute:
between kernels, which fill the caches with weights, every step of theirs waits for memory.
"""

from __future__ import annotations

import ctypes
import itertools
import logging
import sys
from collections.abc import Hashable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from ops.cpu.build import status
from ops.cpu.dispatch import is_plain_call, takes_kernels
from ops.replay.capture import Capture
from ops.replay.changes import Seen
from ops.replay.graph import NotCapturableError
from ops.replay.replay import Replay, unsupported

__all__ = ["Recorded", "recorded_form"]

_log = logging.getLogger(__name__)

# Whose layers do nothing but compute: others might count calls, say, which nobody would repeat.
_KNOWN_PACKAGES = ("backbones.", "ops.", "timm.layers.", "torch.nn.modules.")
_MOST_INPUTS = 16  # kinds of inputs that are remembered
_LONGEST_WAIT = 64  # calls before a network that keeps changing is recorded anew
_GLOBAL_HOOKS = torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks
_LOOKS = ctypes.pythonapi.PyDict_Size, ctypes.pythonapi.PyDict_Next


class Recorded(nn.Module):
    """Before a class whose ``forward`` takes a tensor and gives one: its calls may be repeated.

    The first call with inputs of some shape, strides and dtype runs as ever, the second is
    recorded, those after it follow the record as long as no module inside, nothing that one refers
    to, no parameter and no hook has changed. The layers themselves run otherwise, and where
    gradients, hooks inside, compilation, tracing, profiling or autocast need them. Results are the
    same to the last bit.
    """

    _records: _Records | None = None

    def forward(self, x: Tensor) -> Tensor:
        if x is None or not is_plain_call((x,)) or torch._C._len_torch_function_stack():
            return self.compute(x)
        if self._records is None:
            self._records = _Records()
        return self._records(self, x)

    def compute(self, x: Tensor) -> Tensor:
        """By the layers: what ``forward`` is where it is not recorded."""
        result: Tensor = super().forward(x)
        return result

    def forget(self) -> None:
        """Let calls be recorded anew."""
        self._records = None

    @property
    def is_replayed(self) -> bool:
        """Whether there is a graph that calls follow."""
        records = self._records
        return records is not None and any(
            isinstance(program, Replay) for program in records._programs.values()
        )

    def obstacle(self) -> str | None:
        """Why no graph of it would ever be followed, or None; its calls may have other reasons."""
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


def recorded_form(kind: type[nn.Module], recorded: type[Recorded] = Recorded) -> type[nn.Module]:
    """``kind`` with ``recorded`` before it, under its name; instances may be pickled."""
    form = _forms.get((kind, recorded))
    if form is None:
        members = {
            **{name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")},
            "stands_for": kind,  # see ops.inference.forms
            "__reduce_ex__": lambda self, _: (_restore, (kind, recorded), self.__getstate__()),
        }
        form = _forms[kind, recorded] = type(kind.__name__, (recorded, kind), members)
    return form


def _restore(kind: type[nn.Module], recorded: type[Recorded] = Recorded) -> nn.Module:
    form = recorded_form(kind, recorded)
    return form.__new__(form)


class _Records:
    """The programs of a module, by what they take. The module is passed, lest it never be freed."""

    def __init__(self) -> None:
        # How often there was such an input, or None where its calls cannot be recorded.
        self._programs: dict[Hashable, Replay | int | None] = {}
        self._snapshot: _Snapshot | None = None
        self._wait = 1  # calls before one is recorded

    def __call__(self, module: Recorded, x: Tensor) -> Tensor:
        key = (x.shape, x.stride(), x.dtype, torch.get_num_threads())
        program = self._programs.get(key, 0)
        if program is None:
            return module.compute(x)
        snapshot = self._snapshot
        if snapshot is not None and not snapshot.holds():
            self._begin_anew()
            snapshot, program = None, 0
        if snapshot is not None and snapshot.wants_gradients(x):
            return module.compute(x)
        if isinstance(program, Replay):
            return program(x)
        if program >= self._wait:
            return self._record(module, key, x)
        if len(self._programs) >= _MOST_INPUTS:
            self._programs.clear()
        self._programs[key] = program + 1
        return module.compute(x)

    def _record(self, module: Recorded, key: Hashable, x: Tensor) -> Tensor:
        try:
            snapshot = self._snapshot or _Snapshot(module)
        except NotCapturableError as error:
            _log.debug("%s is not recorded: %s", type(module).__name__, error)
            self._programs[key] = -_LONGEST_WAIT  # hooks may go again
            return module.compute(x)
        if snapshot.wants_gradients(x):
            return module.compute(x)
        with Capture(x) as capture:
            result = module.compute(x)
        if not snapshot.holds():  # weights were packed anew, say
            self._begin_anew()
            return result
        try:
            self._programs[key] = Replay(capture.finish(result))
            self._snapshot = snapshot
        except NotCapturableError as error:
            _log.debug("%s is not recorded: %s", type(module).__name__, error)
            self._programs[key] = None
        return result

    def _begin_anew(self) -> None:
        self._programs.clear()
        self._snapshot = None
        self._wait = min(2 * self._wait, _LONGEST_WAIT)


class _Snapshot:
    """What a module refers to, for telling whether that has changed.

    Raises:
        NotCapturableError: there are hooks inside, layers of which nothing is known, or no kernel.
    """

    def __init__(self, module: Recorded) -> None:
        reason = unsupported()
        if reason is not None:
            raise NotCapturableError(reason)
        if not getattr(sys, "_is_gil_enabled", lambda: True)():
            raise NotCapturableError("a Python without its lock may change what is looked at")
        # Through PyDLL, since Python's lock has to be held.
        self._same_values = ctypes.PyDLL(str(status("replay").path)).replay_same_values
        modules = list(module.modules())
        for inner in modules:
            _require_known(inner, is_root=inner is module)
        held = [d for m in modules for d in _dicts_of(m)]
        # An identity, which a folded layer leaves behind, has nothing that could matter.
        counted = [vars(m) for m in modules if isinstance(m, nn.Identity)]
        compared = [*(vars(m) for m in modules if not isinstance(m, nn.Identity)), *held]
        compared += _GLOBAL_HOOKS
        values = [v for d in compared for v in d.values()]
        # Kept, so that nothing else comes to lie there; but for what keeps this very snapshot.
        self._kept = [
            *(d for d in (*compared, *counted) if d is not vars(module)),
            *(v for v in values if v is not module._records),
        ]
        counts = (*map(len, compared), *(-1 - len(d) for d in counted))
        self._arguments = (
            *(ctypes.cast(f, ctypes.c_void_p) for f in _LOOKS),
            ctypes.c_int64(len(counts)),
            _words(map(id, (*compared, *counted))),
            _words(counts),
            _words(map(id, values)),
        )
        self._tensors = list(itertools.chain(module.parameters(), module.buffers()))
        if not takes_kernels(self._tensors):
            raise NotCapturableError("its parameters and buffers are no plain tensors of the CPU")
        self._seen = Seen(self._tensors)

    def holds(self) -> bool:
        """Whether all is as it was."""
        return bool(self._same_values(*self._arguments)) and self._seen.unchanged()

    def wants_gradients(self, x: Tensor) -> bool:
        """Whether autograd has to know of a call with ``x``."""
        if not torch.is_grad_enabled():
            return False
        return x.requires_grad or any(t.requires_grad for t in self._tensors)


def _require_known(module: nn.Module, *, is_root: bool) -> None:
    kind = type(module)
    if not f"{kind.__module__}.".startswith(_KNOWN_PACKAGES) or "forward" in vars(module):
        raise NotCapturableError(f"nothing is known of {kind.__module__}.{kind.__qualname__}")
    if not is_root and (module._forward_hooks or module._forward_pre_hooks):
        raise NotCapturableError(f"a {kind.__name__} has hooks")


def _dicts_of(module: nn.Module) -> tuple[Any, ...]:
    """What it holds, but for its attributes."""
    hooks = module._forward_hooks, module._forward_pre_hooks
    return module._parameters, module._buffers, module._modules, *hooks


def _words(numbers: Iterable[int]) -> Any:
    words = tuple(numbers)
    return (ctypes.c_int64 * len(words))(*words)
