"""Recording: the operators of one call of a module, as ATen names them.

ATen's schemas say of each operator what it modifies and its tags whether its result depends on
values, so no operator has to be known beforehand. What depends only on weights is computed here,
once; in-place operators are recorded as those that return a new tensor.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Set
from contextlib import ExitStack
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from ops.cpu.call.binding import kernel_of
from ops.cpu.policy import Decision, observe_decisions
from ops.inference.packed_linear import quantization_of
from ops.replay.graph import NotCapturableError
from ops.rewriting.graph import Operator, OperatorGraph, Value, by_name

__all__ = ["callers", "record"]

_aten = torch.ops.aten
# Operators whose result is their first argument, or has its values.
_SAME = {_aten.alias.default, _aten.detach.default, _aten.contiguous.default, _aten.clone.default}
# Operators that need strides which the results of rewritten ones may not have.
_COPYING = dict.fromkeys((_aten.view.default, _aten._unsafe_view.default), _aten.reshape.default)
_DEPENDS_ON_VALUES = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


def record(module: nn.Module, call: Callable[[Tensor], Any], x: Tensor) -> OperatorGraph:
    """The operators of ``call(x)``.

    Args:
        module: the module that is called, in eval mode, for the paths of operators.
        call: runs it on one tensor; nothing else may change from call to call.
        x: the input; it is not modified.

    Raises:
        NotCapturableError: the calls depend on values of tensors, or modify what was there before.
    """
    recorder = _Recorder(module, x)
    with ExitStack() as contexts:
        # Below autograd, composite operators such as a linear layer are seen whole.
        for context in (torch.no_grad(), torch._C._AutoDispatchBelowAutograd()):
            contexts.enter_context(context)
        contexts.enter_context(observe_decisions(recorder.note_decision))
        contexts.enter_context(recorder)
        result = call(x)
    if recorder.failure is not None:
        raise recorder.failure
    outputs = pytree.tree_map_only(Tensor, recorder.value_of, result)
    if not any(isinstance(leaf, Value) for leaf in pytree.tree_leaves(outputs)):
        raise NotCapturableError(f"the result is a {type(result).__name__} without tensors")
    return OperatorGraph(recorder.source, recorder.operators, outputs)


class _Recorder(TorchDispatchMode):
    def __init__(self, module: nn.Module, x: Tensor) -> None:
        super().__init__()
        self.failure: NotCapturableError | None = None
        self.operators: list[Operator] = []
        self.source = Value.like(x)
        self._paths = {id(m): path for path, m in module.named_modules()}
        self._quantized = {
            id(weight): quantization
            for m in module.modules()
            if (quantization := quantization_of(m)) is not None
            if (weight := m._parameters.get("weight")) is not None
        }
        self._input_storage = _storage(x)
        # Storages of constants that this call made, and of what operators have read since it was.
        self._fresh: set[int] = set()
        self._read: set[int] = set()
        # How often each storage was modified: now, and when each tensor was returned.
        self._changes: dict[int, int] = {}
        self._values: Any = WeakIdKeyDictionary()  # of tensors: their value, and these changes
        self._remember(x, self.source)
        self._decisions: dict[str, list[Decision]] = {}  # by path

    def value_of(self, t: Tensor) -> Value:
        """The value of a tensor; one that no recorded operator returned is a constant."""
        known = self._values.get(t)
        if known is None:
            value = Value.of_constant(t.detach())
            value.quantization = self._quantized.get(id(t))
            self._values[t] = value, None
            return value
        value, changes = known
        if changes is not None and changes != self._changes.get(_storage(t), 0):
            raise NotCapturableError("a view of a tensor modified in place is read")
        return value

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.failure is None:
            try:
                self._note(func, args, kwargs or {}, result)
            except NotCapturableError as error:
                self.failure = error
        return result

    def _note(self, func: Any, args: Any, kwargs: dict[str, Any], result: Any) -> None:
        given = pytree.tree_map_only(Tensor, self.value_of, (list(args), kwargs))
        read = [leaf for leaf in pytree.tree_leaves(given) if isinstance(leaf, Value)]
        varies = any(v.constant is None for v in read)
        if _is_random(func, args, kwargs):
            raise NotCapturableError(f"{func} is random")
        if func._schema.is_mutable and not varies:
            is_new = _storage(args[0]) in self._fresh - self._read
            if not is_new and func is not _aten.detach_.default:  # of one made from numbers
                raise NotCapturableError(f"{func} modifies an existing tensor")
            return
        if func._schema.is_mutable and kernel_of(func) is not None:
            self._note_writing(func, args, given)
            return
        if func._schema.is_mutable:
            self._note_modification(func, args, given, result)
            return
        if varies and _depends_on_values(func, read):
            raise NotCapturableError(f"what {func} gives depends on values")
        results = [result] if isinstance(result, Tensor) else result
        if not isinstance(results, tuple | list) or not all(isinstance(t, Tensor) for t in results):
            if varies:
                raise NotCapturableError(f"{func} gives a {type(result).__name__}")
            return
        made, used = {*map(_storage, results)}, _storages((args, kwargs))
        if not varies:  # its results are constants
            self._fresh |= made - used - {0}
            self._read -= made - used
            return
        self._add(func, given, results, isinstance(result, tuple | list))
        if not made <= used:  # not only views
            copies = made - {0} if func in _SAME else set()  # which stand for what is read
            self._note_reading(used | copies, made)

    def _add(self, func: Any, given: Any, results: Any, returns_list: bool) -> None:
        func = kernel_of(func) or _COPYING.get(func, func)
        values = [Value.like(t) for t in results]
        if func in _SAME or _is_inactive_dropout(func, given[0]):
            values = [given[0][0]]
        else:
            self.operators.append(self._made(func, given, values, returns_list))
        for t, value in zip(results, values, strict=True):
            self._remember(t, value)

    def _note_reading(self, read: set[int], made: Set[int] = frozenset()) -> None:
        """Note the storages that an operator has read, and new ones, which nothing has."""
        self._read = (self._read - made) | read

    def _note_writing(self, func: Any, args: Any, given: Any) -> None:
        """Record a kernel that writes to tensors that nothing has read yet."""
        is_written = [a.is_write for a in func._schema.arguments]
        for t, value, written in zip(args, given[0], is_written, strict=False):
            if written and (value.constant is not None or _storage(t) in self._read):
                raise NotCapturableError(f"{func} modifies an existing tensor")
            if written and _storage(t) == self._input_storage:
                raise NotCapturableError(f"{func} modifies the input")
        self.operators.append(self._made(kernel_of(func), given, [], False))
        self._note_reading(
            _storages([t for t, written in zip(args, is_written, strict=False) if not written])
        )

    def _note_modification(self, func: Any, args: Any, given: Any, result: Any) -> None:
        """Record an in-place operator as one that returns a new tensor."""
        name, overload = func._schema.name.removeprefix("aten::"), func._overloadname
        packet = getattr(_aten, name.removesuffix("_"), None) if name.endswith("_") else None
        functional = getattr(packet, overload, None)
        target = args[0]
        if functional is None or result is not target or given[0][0].constant is not None:
            raise NotCapturableError(f"{func} modifies an existing tensor")
        storage = _storage(target)
        if storage == self._input_storage:
            raise NotCapturableError(f"{func} modifies the input")
        self._changes[storage] = self._changes.get(storage, 0) + 1
        self._add(functional, given, [target], returns_list=False)
        self._note_reading(_storages(args[1:]), {storage})

    def _made(self, func: Any, given: Any, results: list[Value], returns_list: bool) -> Operator:
        path, (args, kwargs) = self._caller(), given
        decisions = tuple(self._decisions.get(path, ()))
        return Operator(func, args, kwargs, results, returns_list, path, decisions)

    def note_decision(self, decision: Decision) -> None:
        """Note a rule that a module consulted."""
        known = self._decisions.setdefault(self._caller(), [])
        if decision not in known:
            known.append(decision)

    def _remember(self, t: Tensor, value: Value) -> None:
        self._values[t] = value, self._changes.get(_storage(t), 0)

    def _caller(self) -> str:
        """The path of the module whose method made the call."""
        return next((self._paths[id(c)] for c in callers() if id(c) in self._paths), "")


def callers() -> Iterator[Any]:
    """The objects whose methods are running in this thread, the innermost first."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code.co_varnames[:1] == ("self",):
            yield frame.f_locals.get("self")
        frame = frame.f_back


def _storage(t: Any) -> int:
    return t.untyped_storage().data_ptr() if isinstance(t, Tensor) else 0


def _storages(args: Any) -> set[int]:
    return {_storage(leaf) for leaf in pytree.tree_leaves(args)} - {0}


def _depends_on_values(func: Any, read: list[Value]) -> bool:
    """Whether the shape of a result, or a number, depends on values; masks do as indices."""
    if func is _aten.index.Tensor:
        return any(v.dtype in (torch.bool, torch.uint8) for v in read[1:])
    return bool(_DEPENDS_ON_VALUES & {*func.tags})


def _is_random(func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether the results differ from call to call, as without dropout they do not."""
    if torch.Tag.nondeterministic_seeded not in func.tags:
        return False
    given = by_name(func, args, kwargs)
    if any(given.get(name) is False for name in ("train", "training")):
        return False
    # Of attention and LSTMs.
    rates = [given[name] for name in ("dropout_p", "dropout") if name in given]
    return not rates or rates[0] > 0


def _is_inactive_dropout(func: Any, args: Any) -> bool:
    return func is _aten.dropout.default and not args[2]
