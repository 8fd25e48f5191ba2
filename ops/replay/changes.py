"""Change detection for tensors and modules that something else was derived from."""

from __future__ import annotations

import ctypes
import itertools
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from ops.cpu.build import status, unavailable_reason
from ops.cpu.call.dispatch import kernels_apply
from ops.replay.graph import NotCapturableError

_GLOBAL_HOOKS = torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks
_DICT_FUNCTIONS = ctypes.pythonapi.PyDict_Size, ctypes.pythonapi.PyDict_Next


class TensorSnapshot:
    """A snapshot of tensors that detects later changes to them.

    Detects replaced tensors, replaced memory (as by ``vector_to_parameters``) and in-place changes
    that torch's version counter covers: those by operators, with or without gradient tracking. The
    counter misses writes through ``.data``, NumPy or DLPack, writes by optimizers with
    ``fused=True``, and all writes to tensors created in inference mode.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._tensors = list(tensors)
        self._versioned = [t for t in self._tensors if not t.is_inference()]
        self._ids = list(map(id, self._tensors))
        self._versions = list(map(_version, self._versioned))
        self._memory = list(map(_memory, self._tensors))
        # So that no other tensor reuses the memory.
        self._kept = [t.detach() for t in self._tensors]

    def matches(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these are the same tensors, unchanged."""
        with torch._C.DisableTorchFunction():  # hide this from captures
            return list(map(id, tensors)) == self._ids and self.unchanged()

    def unchanged(self) -> bool:
        """Whether the tensors are unchanged since the snapshot."""
        return (
            list(map(_version, self._versioned)) == self._versions
            and list(map(_memory, self._tensors)) == self._memory
        )


_version: Any = torch._C.TensorBase._version.__get__  # type: ignore[attr-defined]
_memory = torch._C.TensorBase.data_ptr


class ModuleSnapshot:
    """Everything that a module refers to, for detecting changes.

    Raises:
        NotCapturableError: hooks inside, or no kernel.
    """

    def __init__(self, module: Any) -> None:
        reason = unavailable_reason("replay")
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
