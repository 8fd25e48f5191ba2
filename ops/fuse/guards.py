"""Guards: what must still hold for a recording to be what the module would do.

Watched are a module's parameters and buffers, the attributes of all its modules, and what these
hold: lists, dictionaries, tensors, functions with their closures, objects with attributes; the
classes of all of them; hooks; and the global variables of the code that ran. Code of torch, numpy
and Python itself is trusted. Dictionaries tell when they change where Python has watchers
(:mod:`ops.fuse.watchers`). Other things are a few words of memory where :mod:`ops.fuse.layout`
knows them. What has changed, and everything else, is compared.
"""

from __future__ import annotations

import collections
import contextvars
import ctypes
import functools
import gc
import operator
import os
import sys
import sysconfig
import threading
import types
import weakref
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.utils.hooks import RemovableHandle

from ops.cpu.build import status, unavailable_reason
from ops.fuse import layout
from ops.fuse.structure import is_constant
from ops.fuse.watchers import watcher

__all__ = ["Guards", "TensorSnapshot", "is_trusted"]

# Attributes that this library keeps on modules, which no forward of theirs reads.
IGNORED = frozenset(("_calls", "_derived", "_made_from", "decisions"))
_HOLDERS = ("argparse", "collections", "types")  # modules of Python with classes of settings
_HOOKS = frozenset(name for name in vars(nn.Module()) if "_hook" in name)
_UNREAD = frozenset((*IGNORED, *_HOOKS, "_non_persistent_buffers_set"))  # unless there are hooks
_CONTAINERS = (dict, list, tuple, set, frozenset, collections.deque)
_LARGEST_ARRAY = 4096  # bytes of an array that is compared
_MOST = 1 << 17  # values that are watched
_LIBRARIES: tuple[Any, ...] = (torch, np)
_TRUSTED = tuple(
    f"{path}/"
    for path in (
        *(Path(m.__file__).parent for m in _LIBRARIES),
        *(Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib")),
    )
)
_OWN = f"{Path(__file__).parent.parent}/"
_SITE = tuple({f"{sysconfig.get_path(name)}/" for name in ("purelib", "platlib")})


@functools.cache
def is_trusted(file: str) -> bool:
    """Whether code of a file keeps no state that calls depend on: torch's, numpy's, Python's."""
    if file.startswith(("<frozen", _OWN)):
        return True
    within = file.startswith(_TRUSTED)
    return within and not (file.startswith(_SITE) and not file.startswith(_TRUSTED[:2]))


@functools.cache
def _is_trusted_class(kind: Any) -> bool:
    module = sys.modules.get(kind.__module__)
    file = getattr(module, "__file__", None)
    if file is None:
        return str(kind.__module__).partition(".")[0] in sys.stdlib_module_names - {"__main__"}
    return is_trusted(file)


def _is_trusted_module(module: types.ModuleType) -> bool:
    return is_trusted(getattr(module, "__file__", None) or "<frozen")


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


class _Noted:
    """Words of memory, and checks of what has none, that hold unless something has changed.

    Args:
        number: of all that is watched, how much this covers.
    """

    def __init__(
        self, words: Collection[layout.Word], checks: Collection[Callable[[], bool]], number: int
    ) -> None:
        self.words, self.checks, self.number = words, checks, number
        _, addresses, values = zip(*sorted(words), strict=True)
        array = ctypes.c_int64 * len(words)
        self.values = array(*values)
        self._arguments = ctypes.c_int64(len(words)), array(*addresses), self.values
        library = ctypes.PyDLL(str(status("replay").path))  # which holds the GIL
        self._same_words = library.replay_same_words

    def holds(self) -> bool:
        same = self._same_words(*self._arguments)
        return bool(same) and all(check() for check in self.checks)


class Guards:
    """What a module, and the code that it ran, refer to.

    Args:
        module: its attributes and everything that they hold are watched. No reference to it is
            kept, to avoid a cycle.

    Attributes:
        failure: why changes can't be seen, if so.
        tensors, identities: all that are watched.
    """

    def __init__(self, module: nn.Module | None) -> None:
        self.failure = unavailable_reason("replay")
        if not getattr(sys, "_is_gil_enabled", lambda: True)():
            self.failure = "a free-threaded Python could change the module during the check"
        self.tensors: list[Tensor] = []
        self.identities: set[int] = set()
        # What gives the words of each thing that is watched, and what compares it without them.
        self._watched: list[tuple[Callable[[], layout.Words | None], Callable[[], bool]]] = []
        self._dicts: dict[int, list[Callable[[], bool]]] = {}  # that tell of changes, by identity
        self._hooked: list[tuple[Callable[[], Any], list[tuple[str, int]]]] = []
        self._kept: list[Any] = []  # so that identities are not reused
        self._seen: set[int] = set()
        self._codes: set[types.CodeType] = set()
        self._names: set[tuple[int, str]] = set()  # global variables
        self._handles = RemovableHandle.next_id
        self._root = None if module is None else id(module)
        if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
            self.failure = "hooks of all modules are set"
        if self.failure is None:
            self._watcher = watcher()
            self._changes = self._watcher.changes()
            self._noted = self._nothing()
            if module is not None:
                self._walk([module])

    # -- checks ----------------------------------------------------------------------------------

    def hold(self) -> bool:
        """Whether nothing has changed."""
        if self.failure is not None:
            return False
        if self._handles != RemovableHandle.next_id:  # a hook was added, here or elsewhere
            if self._hooks_changed():
                return False
            self._handles = RemovableHandle.next_id
        noted = self._noted
        same = noted.holds()
        if not same and (changes := self._watcher.changes()) != self._changes:
            if not self._dicts_hold(changes):
                return False
            self._changes = noted.values[0] = changes
            same = noted.holds()
        if same and noted.number == len(self._watched):
            return True
        noted = self._note(noted if same else self._nothing())
        if not all(check() for _, check in self._watched[self._noted.number if same else 0 :]):
            return False
        self._noted = noted  # something only moved, or was replaced by its equal
        return True

    def _nothing(self) -> _Noted:
        return _Noted([(-1, self._watcher.address, self._changes)], [], 0)  # the first word

    def _note(self, noted: _Noted) -> _Noted:
        """What is noted, and everything else as it is now."""
        found, checks, number = {*noted.words}, [*noted.checks], len(self._watched)
        for words_of, check in self._watched[noted.number : number]:
            words = words_of()
            if words is None:
                checks.append(check)
            else:
                found.update(words)
        return _Noted(found, checks, number)

    def _dicts_hold(self, changes: int) -> bool:
        changed = self._watcher.changed(self._changes, changes)
        found = self._dicts.keys() if changed is None else changed & self._dicts.keys()
        return all(check() for identity in found for check in self._dicts[identity])

    def needs_gradients(self) -> bool:
        """Whether autograd must see calls even if no input requires gradients."""
        return any(t.requires_grad for t in self.tensors)

    def _hooks_changed(self) -> bool:
        if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
            return True
        return any(
            len(vars(module())[name]) != count
            for module, counts in self._hooked
            for name, count in counts
        )

    # -- what is watched -------------------------------------------------------------------------

    def watch_code(self, frames: Mapping[types.CodeType, dict[str, Any]]) -> None:
        """Watch what code refers to: global variables, and attributes of modules of Python."""
        if self.failure is not None:
            return
        names: dict[int, tuple[dict[str, Any], dict[str, Any]]] = {}

        def note(held: dict[str, Any], name: str) -> Any:
            if (id(held), name) not in self._names:
                self._names.add((id(held), name))
                names.setdefault(id(held), (held, {}))[1][name] = held[name]
            return held[name]

        for code, variables in frames.items():
            if code in self._codes or is_trusted(code.co_filename):
                continue
            self._codes.add(code)
            if not {"environ", "getenv"}.isdisjoint(code.co_names):
                self._watch(_unknown, functools.partial(os.environ.__eq__, dict(os.environ)))
            for name in (n for n in code.co_names if n in variables):
                value = note(variables, name)
                if isinstance(value, types.ModuleType) and not _is_trusted_module(value):
                    for inner in code.co_names:
                        if inner in vars(value):
                            note(vars(value), inner)
        for held, chosen in names.values():
            words = functools.partial(layout.words_of_names, held, [*chosen])
            check = functools.partial(_same_names, functools.partial(_itself, held), chosen)
            self._watch_dict(held, words, check)
            self._walk(chosen.values())

    def watch(self, values: Iterable[Any]) -> None:
        """Watch values that no attribute of the module holds."""
        self._walk(values)

    def _watch(self, words: Callable[[], layout.Words | None], check: Callable[[], bool]) -> None:
        self._watched.append((words, check))

    def _watch_dict(
        self,
        held: dict[Any, Any],
        words: Callable[[], layout.Words | None],
        make_check: Callable[[], Callable[[], bool]],
        *,
        of_object: bool = False,
    ) -> None:
        is_ordered = type(held) is collections.OrderedDict
        if not is_ordered and self._watcher.watch(held, of_object=of_object):
            self._dicts.setdefault(id(held), []).append(make_check())
        else:
            self._watch(words, make_check())

    def _walk(self, values: Iterable[Any]) -> None:
        pending, seen = [*values], self._seen
        while pending and self.failure is None:
            value = pending.pop()
            if id(value) in seen or is_constant(value) and not isinstance(value, type):
                continue
            seen.add(id(value))
            if id(value) != self._root:
                self._kept.append(value)  # so that its identity is not reused
            if len(seen) > _MOST:
                self.failure = f"it refers to more than {_MOST} values"
                return
            pending += self._visit(value)

    def _visit(self, value: Any) -> Iterable[Any]:
        """Watch a value; returns what else it refers to."""
        if isinstance(value, Tensor):
            return self._visit_tensor(value)
        if isinstance(value, nn.Module):
            return self._visit_module(value)
        if isinstance(value, _CONTAINERS):
            own = () if type(value) in _CONTAINERS else self._visit_object(value)
            return [*self._visit_container(value), *own]
        if isinstance(value, np.ndarray):
            if value.nbytes <= _LARGEST_ARRAY and value.dtype != object:
                data = value.tobytes()
                self._watch(_unknown, lambda: value.tobytes() == data)
            return ()
        if isinstance(value, type):
            return self._visit_class(value)
        return self._visit_object(value)

    def _visit_container(self, value: Any) -> Iterable[Any]:
        if isinstance(value, tuple):
            return value
        if isinstance(value, dict):
            return self._visit_dict(value)
        kept = [*value]
        words = functools.partial(layout.words_of_list, value)
        self._watch(words if isinstance(value, list) else _unknown, lambda: _same([*value], kept))
        return kept

    def _visit_tensor(self, tensor: Tensor) -> Iterable[Any]:
        if type(tensor) not in (Tensor, nn.Parameter, nn.Buffer) or tensor.layout != torch.strided:
            kind = type(tensor).__name__
            self.failure = f"it holds a {kind} of layout {tensor.layout}, whose changes aren't seen"
            return ()
        self.tensors.append(tensor)
        self.identities.add(id(tensor))
        snapshot, before = TensorSnapshot([tensor]), _seen_of(tensor)
        self._kept.append(snapshot)
        self._watch(
            lambda: layout.words_of_tensor(tensor),
            lambda: snapshot.unchanged() and _seen_of(tensor) == before,
        )
        self._kept.append(vars(tensor))
        return self._visit_dict(vars(tensor), of_object=True)

    def _visit_module(self, module: nn.Module) -> Iterable[Any]:
        if isinstance(module, torch.jit.ScriptModule):
            self.failure = "it holds a ScriptModule"
            return ()
        # An identity, as left behind by a folded layer, has no attribute that affects the result.
        attributes = vars(module)
        hooks = {name: attributes[name] for name in _HOOKS if attributes.get(name)}
        counts = [(n, len(attributes[n])) for n in _HOOKS if isinstance(attributes.get(n), dict)]
        is_root = id(module) == self._root
        this: Any = weakref.ref(module) if is_root else functools.partial(_itself, module)
        self._hooked.append((this, counts))
        if not is_root:
            self._kept.append(attributes)
        self._watch_object(this)
        self._watch_attributes(lambda: vars(this()), _UNREAD, of_object=True)
        values = [value for name, value in attributes.items() if name not in _UNREAD]
        return [*values, *hooks.values(), type(module)]

    def _visit_dict(
        self,
        held: dict[Any, Any],
        ignored: frozenset[str] = frozenset(),
        *,
        of_object: bool = False,
    ) -> Iterable[Any]:
        self._watch_attributes(functools.partial(_itself, held), ignored, of_object=of_object)
        return [value for name, value in held.items() if name not in ignored]

    def _watch_attributes(
        self, held: Callable[[], dict[Any, Any]], ignored: frozenset[str], *, of_object: bool
    ) -> None:
        # Of other keys, and of another order, :mod:`ops.fuse.layout` knows nothing.
        known = type(held()) is not collections.OrderedDict

        def words() -> layout.Words | None:
            names = [name for name in [*held()] if name not in ignored]
            of_names = known and all(type(name) is str for name in names)
            return layout.words_of_dict(held(), ignored) if of_names else None

        check = functools.partial(_same_items, held, ignored)
        self._watch_dict(held(), words, check, of_object=of_object)

    def _watch_object(self, this: Callable[[], Any]) -> None:
        """Watch which class and which dictionary an object has. Precedes what that holds."""
        kind, identity = type(this()), id(vars(this()))
        self._watch(
            lambda: layout.words_of_object(this(), vars(this())),
            lambda: type(this()) is kind and id(vars(this())) == identity,
        )

    def _visit_class(self, kind: type) -> Iterable[Any]:
        found: list[Any] = []
        bases = kind.__mro__
        if not _is_trusted_class(kind):
            self._watch(lambda: layout.words_of_bases(kind), lambda: kind.__mro__ is bases)
        for base in bases:
            if _is_trusted_class(base) or (base is not kind and id(base) in self._seen):
                continue
            self._seen.add(id(base))
            (held,) = (d for d in gc.get_referents(vars(base)) if isinstance(d, dict))
            found += self._visit_dict(held, frozenset(("__dict__", "__weakref__")))
        return found

    def _visit_object(self, value: Any) -> Iterable[Any]:
        if isinstance(value, types.FunctionType):
            if not is_trusted(value.__code__.co_filename):
                return self._visit_function(value)
            return self._visit_function(value) if value.__closure__ else ()
        if isinstance(value, types.MethodType):
            return value.__self__, value.__func__
        if isinstance(value, functools.partial):
            return value.func, value.args, value.keywords
        if isinstance(value, staticmethod | classmethod):
            return (value.__func__,)
        if isinstance(value, contextvars.ContextVar):
            before = [value.get(None)]
            self._watch(_unknown, lambda: _same([value.get(None)], before))
            return before
        if isinstance(value, property):
            return [f for f in (value.fget, value.fset) if f is not None]
        kind: Any = type(value)
        if isinstance(value, types.ModuleType | threading.local) or _is_trusted_class(kind):
            holds = kind.__module__ in _HOLDERS and _has_attributes(value)
            return self._visit_attributes(value) if holds else ()
        found: list[Any] = [type(value)]
        slots = [n for kind in type(value).__mro__ for n in _slots_of(kind) if hasattr(value, n)]
        if slots:
            before = [getattr(value, name) for name in slots]
            self._watch(_unknown, lambda: _same([getattr(value, n, None) for n in slots], before))
            found += before
        if _has_attributes(value):
            found += self._visit_attributes(value)
        return found

    def _visit_attributes(self, value: Any) -> Iterable[Any]:
        self._kept.append(vars(value))
        self._watch_object(functools.partial(_itself, value))
        return self._visit_dict(vars(value), of_object=True)

    def _visit_function(self, function: types.FunctionType) -> Iterable[Any]:
        found = [function.__defaults__, function.__kwdefaults__]
        found += [v for n, v in vars(function).items() if n == "__wrapped__"]
        for cell in function.__closure__ or ():
            self._kept.append(cell)
            content = layout.content_of_cell(cell)
            if id(cell) in self._seen:
                continue
            self._seen.add(id(cell))
            check = functools.partial(_same_cell, cell, content)
            self._watch(functools.partial(layout.words_of_cell, cell), check)
            found.append(content)
        return found


def _seen_of(tensor: Tensor) -> Any:
    """What a version does not count: a tensor's shape, its strides and its first value."""
    return tensor.shape, tensor.stride(), layout.first_value(tensor)


def _has_attributes(value: Any) -> bool:
    """Whether a value has a dictionary; of an alias such as ``list[int]``, it is the list's."""
    return isinstance(getattr(value, "__dict__", None), dict)


def _slots_of(kind: type) -> Sequence[str]:
    slots = vars(kind).get("__slots__", ())
    return (slots,) if isinstance(slots, str) else [n for n in slots if n != "__dict__"]


def _equal(value: Any, other: Any) -> bool:
    """Whether two values are the same, or equal constants."""
    if value is other:
        return True
    if type(value) is not type(other) or not is_constant(value):
        return False
    return bool(value == other) and repr(value) == repr(other)  # of 0.0 and -0.0, (1,) and (True,)


def _itself(value: Any) -> Any:
    return value


def _unknown() -> None:
    """No words are known."""


def _same(values: Sequence[Any], before: Sequence[Any]) -> bool:
    if len(values) != len(before):
        return False
    return all(map(operator.is_, values, before)) or all(map(_equal, values, before))


def _same_cell(cell: Any, content: Any) -> bool:
    return _equal(layout.content_of_cell(cell), content)


def _same_names(
    held: Callable[[], dict[Any, Any]], before: Mapping[Any, Any]
) -> Callable[[], bool]:
    """What tells whether names have the values that they had before."""
    names, values, missing = [*before], [*before.values()], object()
    return lambda: _same([dict.get(held(), name, missing) for name in names], values)


def _same_items(held: Callable[[], dict[Any, Any]], ignored: frozenset[str]) -> Callable[[], bool]:
    """What tells whether a dictionary holds what it does now."""

    def names_now() -> list[Any]:
        return [name for name in [*held()] if name not in ignored]

    names = names_now()
    same_names = _same_names(held, {name: dict.get(held(), name) for name in names})
    return lambda: names_now() == names and same_names()
