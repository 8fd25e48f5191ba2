"""Change detection for tensors and modules that something else was derived from.

A call of a network leaves the caches full of weights, so that each object that is looked at costs a
trip to memory. What tells changes is therefore compared word by word at addresses known beforehand,
many trips at a time, and object by object only if a word has changed.
"""

from __future__ import annotations

import ctypes
import itertools
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.utils.hooks import RemovableHandle

from ops.cpu.build import status, unavailable_reason
from ops.cpu.call.dispatch import kernels_apply
from ops.replay.graph import NotCapturableError

_DICT_FUNCTIONS = ctypes.pythonapi.PyDict_Size, ctypes.pythonapi.PyDict_Next


class _Layout(NamedTuple):
    """Which 8-byte words of torch's objects tell that a tensor has changed."""

    impl: int  # of Python's tensor: its TensorImpl
    storage: int  # of the TensorImpl: its StorageImpl,
    offset: int  # its offset in it,
    counter: int  # its version counter; 0 for tensors created in inference mode
    data: int  # of the StorageImpl: its memory
    version: int  # of the version counter: the version

    def words(self, tensor: Tensor) -> Iterator[tuple[int, int]]:
        """The addresses and values of a tensor's words, each after the word that leads to it."""
        impl, storage = tensor._cdata, tensor.untyped_storage()._cdata
        counter = _words_at(impl)[self.counter]
        objects = [(id(tensor), self.impl), (impl, self.storage), (impl, self.offset)]
        objects += [(storage, self.data), (impl, self.counter)]
        objects += [(counter, self.version)] if counter else []
        for address, word in objects:
            yield address + 8 * word, _words_at(address)[word]


def _words_at(address: int, count: int = 20) -> Any:
    return (ctypes.c_int64 * count).from_address(address)


@torch.inference_mode(False)
def _find_layout() -> _Layout | None:
    """The layout of this torch, found on tensors that differ in one thing; None if in doubt."""
    memory = [torch.zeros(987, device="cpu") for _ in range(8)]
    tensors = [m[654:] for m in memory]
    first, impl, storage = tensors[0], tensors[0]._cdata, memory[0].untyped_storage()._cdata
    # A detached tensor shares the version counter and the storage; all others have their own.
    detached, *others = (_words_at(t._cdata) for t in (first.detach(), *tensors))
    own = [i for i, words in enumerate(zip(*others, strict=True)) if len({*words}) == len(words)]
    counters = [i for i in own if detached[i] == others[0][i] != storage]
    found = [
        _places(impl, id(first), 8),
        _places(storage, impl),
        _places(654, impl),
        counters,
        _places(memory[0].data_ptr(), storage, 8)[:1],  # what frees the memory knows it, too
    ]
    if any(len(places) != 1 for places in found):
        return None
    counter = _words_at(impl)[counters[0]]
    versions = _versions(first, counter)
    first.zero_()
    versions &= _versions(first, counter)
    return _Layout(*(places[0] for places in found), *versions) if len(versions) == 1 else None


def _versions(tensor: Tensor, counter: int) -> set[int]:
    """The words that may be the version, whose upper half is padding."""
    words = enumerate(_words_at(counter, 3))
    return {i for i, word in words if word & 0xFFFFFFFF == tensor._version}


def _places(value: int, address: int, count: int = 20) -> list[int]:
    return [i for i, word in enumerate(_words_at(address, count)) if word == value]


_LAYOUT = _find_layout()


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
        self._same_values, self._same_words = library.replay_same_values, library.replay_same_words
        self._inner = [*module.modules()][1:]
        self._handles = RemovableHandle.next_id
        if hooked := self._hooked():
            raise NotCapturableError(f"a {hooked} has hooks")
        # An identity, as left behind by a folded layer, has no attribute that affects the result.
        modules = [module, *self._inner]
        counted = [vars(m) for m in modules if isinstance(m, nn.Identity)]
        others = [m for m in modules if not isinstance(m, nn.Identity)]
        compared = [d for m in others for d in (vars(m), m._parameters, m._buffers, m._modules)]
        values = [v for d in compared for v in d.values()]
        # Kept alive, so that ids are not reused. What refers to this snapshot is left out, to avoid
        # a cycle.
        self._kept = [
            *(d for d in (*compared, *counted) if d is not vars(module)),
            *(v for v in values if v is not module._records),
        ]
        counts = (*map(len, compared), *(-1 - len(d) for d in counted))
        self._dicts = (
            *(ctypes.cast(f, ctypes.c_void_p) for f in _DICT_FUNCTIONS),
            ctypes.c_int64(len(counts)),
            _array(map(id, (*compared, *counted))),
            _array(counts),
            _array(map(id, values)),
        )
        self._tensors = list(itertools.chain(module.parameters(), module.buffers()))
        if not kernels_apply(self._tensors):
            raise NotCapturableError("its parameters and buffers are not plain CPU tensors")
        self._tensor_snapshot = TensorSnapshot(self._tensors)
        self._words = _words_of(self._tensors, compared, counted)

    def is_valid(self) -> bool:
        """Whether the module is unchanged."""
        if self._handles != RemovableHandle.next_id:  # a hook was added, here or elsewhere
            if self._hooked():
                return False
            self._handles = RemovableHandle.next_id
        if self._words and self._same_words(*self._words):
            return True
        self._words = None  # something may only have moved
        return bool(self._same_values(*self._dicts)) and self._tensor_snapshot.unchanged()

    def needs_gradients(self, x: Tensor) -> bool:
        """Whether autograd must see a call with ``x``."""
        if not torch.is_grad_enabled():
            return False
        return x.requires_grad or any(t.requires_grad for t in self._tensors)

    def _hooked(self) -> str | None:
        """The class of an inner module with hooks; "module" if there are some for all modules."""
        if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
            return "module"
        hooked = (m for m in self._inner if m._forward_hooks or m._forward_pre_hooks)
        return next((type(m).__name__ for m in hooked), None)


def _words_of(
    tensors: Sequence[Tensor], compared: Sequence[dict[str, Any]], counted: Sequence[dict[str, Any]]
) -> tuple[Any, ...] | None:
    """The arguments of ``replay_same_words``; None if a layout is unknown."""
    if _LAYOUT is None:
        return None
    words = [(id(d) + 8 * _COUNT, len(d)) for d in counted]
    for held in compared:
        found = _words_of_dict(held)
        if found is None:
            return None
        words += found
    words += [word for t in tensors for word in _LAYOUT.words(t)]
    return (ctypes.c_int64(len(words)), *map(_array, zip(*words, strict=True)))


_COUNT, _KEYS, _VALUES = 2, 4, 5  # the words of CPython's dictionaries that hold these
_MOST_SLOTS = 31  # where values are apart from keys, which an object's dictionary shares


def _words_of_dict(held: dict[str, Any]) -> list[tuple[int, int]] | None:
    """The addresses and values of words, one of which changes if another value is held.

    They are the number of values, where keys and values are, and what holds a value; None if these
    are not found.
    """
    head = _words_at(id(held), _VALUES + 1)
    words = [(id(held) + 8 * i, head[i]) for i in (_COUNT, _KEYS, _VALUES)]
    if head[_COUNT] != len(held):
        return None
    wanted, found = {*map(id, held.values())}, 0
    begin, size = head[_KEYS], (held.__sizeof__() - {}.__sizeof__()) // 8
    if head[_VALUES]:
        begin, size = head[_VALUES], _MOST_SLOTS
    for address in range(begin, begin + 8 * size, 8) if held else ():
        word = ctypes.c_int64.from_address(address).value
        if word in wanted:
            words.append((address, word))
            found += 1
        if head[_VALUES] and found == len(held):
            break
    return words if found >= len(held) else None


def _array(numbers: Iterable[int]) -> Any:
    words = tuple(numbers)
    return (ctypes.c_int64 * len(words))(*words)
