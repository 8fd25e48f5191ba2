"""Recording: one real call becomes a graph of ATen operators.

Recording only observes. The call runs once, with its own results and effects, and what it did is
noted: operators with their arguments, which tensors existed before, and what they have in common.
ATen's schemas say of each operator what it modifies and its tags whether its result depends on
values, so no operator has to be known beforehand. What depends only on weights becomes a constant;
in-place operators are noted as those that return a new tensor, also where they write to a view.
Values that leave the graph, as by ``tolist()``, are seen by a profile function, as is the code that
runs.

Two recordings with equal signatures prove that a call does the same for any values.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import CodeType, FrameType, FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from ops.cpu.call.binding import kernel_of
from ops.cpu.policy import Decision, observe_decisions
from ops.fuse.fast_paths import expand
from ops.fuse.nested import leaves, mapped
from ops.fuse.reads import SizeReads
from ops.fuse.structure import Structure, take_apart
from ops.inference.packed_linear import Quantization
from ops.replay.graph import NotCapturableError
from ops.rewriting.graph import Operator, OperatorGraph, Origin, Value, by_name, on_meta

__all__ = ["Recording", "callers", "clock", "record"]

_aten = torch.ops.aten
# Operators whose result has the values of their first argument.
_SAME = {_aten.alias.default, _aten.detach.default, _aten.contiguous.default, _aten.clone.default}
# Operators that need strides which the results of rewritten ones may not have.
_COPYING = dict.fromkeys((_aten.view.default, _aten._unsafe_view.default), _aten.reshape.default)
# Operators that depend only on the shape of their arguments.
_OF_SHAPES = {
    *(_aten.zeros_like, _aten.ones_like, _aten.full_like),
    *(_aten.new_zeros, _aten.new_ones, _aten.new_full),
}
# Operators that return more tensors of a larger one.
_DIVIDING = {_aten.split, _aten.chunk, _aten.unbind, _aten.tensor_split}
_DIVIDING |= {_aten.unsafe_split, _aten.unsafe_chunk}
_ALLOCATIONS = {_aten.empty, _aten.empty_like, _aten.empty_strided, _aten.new_empty}
_LAYOUTS = {_aten.as_strided, _aten.set_, _aten.resize_, _aten.resize_as_, _aten.as_strided_}
# Views that keep the order of values.
_RESHAPES = {
    *("view", "view_as", "_unsafe_view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze")
}
_DEPENDS_ON_VALUES = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
_RESOLUTION = 1e-6  # required resolution of the clock, in seconds
_LARGEST_LIFTED = 4096  # numbers of a tensor made from Python's, which are compared
# Functions in C that give Python a tensor's values or memory, and others that show.
_LEAVING = {
    *("tolist", "numpy", "data_ptr", "untyped_storage", "apply_", "map_", "share_memory_"),
    *("_to_dlpack", "to_dlpack", "_to_dlpack_versioned", "requires_grad_", "print"),
}


@dataclass
class Recording:
    """What one call did.

    Attributes:
        failure: why the call cannot be replayed, if so.
        signature: what an equal call does, too; equal recordings are of the same program.
        outline: what equal programs for inputs of other sizes share.
        graph: the operators; None of a failure.
        is_rewritten: whether they are those of kernels by now.
        structure: how results are put together from the graph's.
        seconds: what the operators took, without the Python in between.
        frames: the code that ran, with its globals.
        constants: the tensors that existed before and were read.
        reads_sizes: whether Python read the size of a tensor, if that was to be seen.
        divided: the sizes that tell how many tensors operators returned.
    """

    failure: str | None = None
    signature: list[Any] = field(default_factory=list, repr=False)
    outline: list[Any] = field(default_factory=list, repr=False)
    graph: OperatorGraph | None = field(default=None, repr=False)
    is_rewritten: bool = False
    structure: Structure | None = field(default=None, repr=False)
    seconds: float = 0.0
    frames: dict[CodeType, dict[str, Any]] = field(default_factory=dict, repr=False)
    constants: list[Tensor] = field(default_factory=list, repr=False)
    reads_sizes: bool | None = None
    divided: list[int] = field(default_factory=list, repr=False)

    def fail(self, reason: str) -> None:
        """Note why the call cannot be replayed, if nothing did before."""
        self.failure = self.failure or reason


def record(
    call: Callable[[], Any],
    inputs: Sequence[Tensor],
    paths: Mapping[int, str],
    quantized: Mapping[int, Quantization],
    *,
    sees_sizes: bool = False,
) -> tuple[Any, Recording]:
    """``call()`` and what it did; what it raises is raised.

    Args:
        inputs: the tensors that may have other values in another call; distinct, without common
            memory.
        paths: of modules by their identities.
        quantized: how layers with a weight, given by its identity, compute in int8.
        sees_sizes: whether to note that Python reads the size of a tensor. Code can see this.
    """
    recorder = _Recorder(inputs, paths, quantized)
    recording = recorder.recording
    with ExitStack() as contexts:
        # Below autograd, composite operators such as a linear layer are seen whole.
        contexts.enter_context(torch._C._AutoDispatchBelowAutograd())
        contexts.enter_context(observe_decisions(recorder.note_decision))
        contexts.enter_context(recorder)
        reads = contexts.enter_context(SizeReads()) if sees_sizes else None
        contexts.enter_context(_Python(recorder))
        result = call()
    recorder.recording.reads_sizes = None if reads is None else reads.found
    recorder.finish(result)
    return result, recording


class _Python:
    """Sees the Python code that runs, and functions that give it values of tensors."""

    def __init__(self, recorder: _Recorder) -> None:
        self._recorder = recorder

    def __enter__(self) -> None:
        recorder, frames = self._recorder, self._recorder.recording.frames
        had_gradients = torch.is_grad_enabled()

        def note(frame: FrameType, event: str, function: Any) -> None:
            if event == "call":
                if frame.f_code not in frames:
                    frames[frame.f_code] = frame.f_globals
            elif event == "c_call":
                if function.__name__ in _LEAVING:
                    recorder.note_leaving(function)
            elif (
                event == "c_return"
                and function is torch._C._set_grad_enabled
                and torch.is_grad_enabled() > had_gradients
            ):
                recorder.leave("it enables gradients")

        self._is_free = sys.getprofile() is None
        if self._is_free:
            sys.setprofile(note)
        else:
            recorder.recording.fail("a profile function is set")

    def __exit__(self, *_: object) -> None:
        if self._is_free:
            sys.setprofile(None)


@contextmanager
def _unprofiled() -> Iterator[None]:
    """Context of the recorder's own code; a profiler of others sees it."""
    function = sys.getprofile()
    if not isinstance(function, FunctionType):
        yield
        return
    sys.setprofile(None)
    try:
        yield
    finally:
        sys.setprofile(function)


@dataclass(eq=False)
class _Memory:
    """What tensors share that are views of each other.

    Attributes:
        number: in the order of first use.
        kind: of an ``input``, of a ``constant`` that existed before, of a ``new`` one, or of a
            ``result``.
        base: the value of the whole, of which the others are views.
        changes: how often it was modified.
        constants: values that hold its tensors.
        is_blank: nothing was written to it but by kernels, and nothing was read.
        weak: keeps the storage's identity from being reused.
        whole: of a new constant, the base itself.
    """

    number: int
    kind: str
    weak: StorageWeakRef = field(repr=False)
    base: Value | None = None
    changes: int = 0
    is_blank: bool = False
    constants: list[Value] = field(default_factory=list)
    whole: Tensor | None = None


@dataclass(eq=False)
class _View:
    """A tensor: its memory, how it is made from the base, and its value after some changes."""

    memory: _Memory
    steps: tuple[tuple[Any, Any, dict[str, Any], int], ...]
    value: Value
    changes: int


class _Recorder(TorchDispatchMode):
    def __init__(
        self,
        inputs: Sequence[Tensor],
        paths: Mapping[int, str],
        quantized: Mapping[int, Quantization],
    ) -> None:
        super().__init__()
        self.recording = Recording()
        self._operators: list[Operator] = []
        self._clock = clock()
        self._inputs, self._paths, self._quantized = inputs, paths, quantized
        self._memories: dict[int, _Memory] = {}  # by storage
        self._memory_count = 0
        self._views: Any = WeakIdKeyDictionary()
        self._numbers: dict[int, int] = {}  # of values
        self._kept: list[Value] = []  # so that identities are not reused
        self._decisions: dict[str, list[Decision]] = {}  # by path
        self.sources = [
            self._register(x, Value.like(x), self._new_memory(x, "input")) for x in inputs
        ]

    # -- tensors ---------------------------------------------------------------------------------

    def _new_memory(self, t: Tensor, kind: str) -> _Memory:
        self._memory_count += 1
        weak = StorageWeakRef(t.untyped_storage())
        memory = self._memories[_storage(t)] = _Memory(self._memory_count, kind, weak)
        if kind == "new":
            memory.whole = t.detach()
        return memory

    def _register(
        self, t: Tensor, value: Value, memory: _Memory, steps: tuple[Any, ...] = ()
    ) -> Value:
        if memory.base is None and not steps:
            memory.base = value
        if value.constant is not None:
            memory.constants.append(value)
        self._numbers.setdefault(id(value), len(self._numbers))
        self._kept.append(value)
        self._views[t] = _View(memory, steps, value, memory.changes)
        return value

    def _view_of(self, t: Tensor) -> _View:
        """A tensor's view; a tensor that no recorded operator returned is a constant."""
        view: _View | None = self._views.get(t)
        if view is None:
            return self._view_of_constant(t)
        memory = view.memory
        if self._memories.get(_storage(t)) is not memory:
            raise NotCapturableError("a tensor got other memory")
        if view.changes == memory.changes:
            return view
        if memory.kind == "new":
            self._register(t, Value.of_constant(t.detach()), memory, view.steps)
            return self._views[t]
        assert memory.base is not None
        value = memory.base
        for step in view.steps:
            if step is None:
                raise NotCapturableError("a view of a tensor modified in place is read")
            func, args, kwargs, index = step
            value = self._apply(func, [value, *args], kwargs, index)
        view.value, view.changes = value, memory.changes
        return view

    def _view_of_constant(self, t: Tensor) -> _View:
        memory = self._memories.get(_storage(t))
        if memory is not None and memory.kind in ("input", "result"):
            raise NotCapturableError("a tensor shares memory with another in an unknown way")
        if memory is None:
            memory = self._new_memory(t, "constant")
        value = Value.of_constant(t.detach())
        value.quantization = self._quantized.get(id(t))
        self._register(t, value, memory, steps=(None,))
        self.recording.constants.append(t)
        self._sign("constant", id(t), t.shape, t.stride(), t.dtype)
        view: _View = self._views[t]
        return view

    def value_of(self, t: Tensor) -> Value:
        """The value of a tensor now."""
        value = self._view_of(t).value
        self._numbers.setdefault(id(value), len(self._numbers))
        return value

    # -- operators -------------------------------------------------------------------------------

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        with _unprofiled():
            return self._dispatch(func, args, kwargs or {})

    def _dispatch(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        recording = self.recording
        given: Any = None
        if recording.failure is None:
            try:
                given = self._before(func, args, kwargs)
            except Exception as error:  # whatever it is, the call goes on
                recording.fail(_reason(error))
        begin = self._clock()
        result = func(*args, **kwargs)
        recording.seconds += self._clock() - begin
        if recording.failure is None:
            try:
                self._note(func, args, kwargs, given, result)
            except Exception as error:
                recording.fail(_reason(error))
        return result

    def _before(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """The arguments with values in place of tensors, and whether any of them varies."""
        if func is _aten.lift_fresh.default and args[0] not in self._views:
            self._note_lifted(args[0])
        given = mapped(Tensor, self.value_of, (list(args), kwargs))
        values = [*leaves(given)]
        read = [v for v in values if isinstance(v, Value)]
        numbers = self._numbers
        if func is not _aten.promote_types.default:  # of no tensors
            self._sign(
                str(func),
                *(numbers[id(v)] if isinstance(v, Value) else _signed(v) for v in values),
            )
        varies = any(v.constant is None for v in read)
        if varies and func.overloadpacket in _LAYOUTS:
            raise NotCapturableError(f"{func} depends on the layout of memory")
        if _is_random(func, args, kwargs):
            raise NotCapturableError(f"{func} is random")
        varies &= func.overloadpacket not in _OF_SHAPES
        if func._schema.is_mutable and isinstance(args[0], Tensor):
            self._keep_constants(self._view_of(args[0]).memory, varies)
        return given, read, varies

    def _keep_constants(self, memory: _Memory, varies: bool) -> None:
        """Before a write to it, let constants that were read keep the values that they had."""
        if memory.kind != "new":
            return
        for value in memory.constants:
            assert value.constant is not None
            value.constant = value.constant.clone()
        memory.constants.clear()
        if varies:
            assert memory.whole is not None
            memory.kind, memory.base = "result", Value.of_constant(memory.whole.clone())
            self._kept.append(memory.base)

    def _note(self, func: Any, args: Any, kwargs: Any, before: Any, result: Any) -> None:
        given, read, varies = before
        if func._schema.is_mutable:
            self._note_writing(func, args, given, read, varies, result)
            return
        values = expand(self._apply_to, func, *given) if varies else None
        if values is not None:
            self._note_expanded(result, values)
            return
        if varies and _depends_on_values(func, given, read):
            raise NotCapturableError(f"what {func} gives depends on values")
        results = [result] if isinstance(result, Tensor) else result
        if not isinstance(results, tuple | list) or not all(isinstance(t, Tensor) for t in results):
            if varies:
                raise NotCapturableError(f"{func} gives Python a {type(result).__name__}")
            if read:
                self._sign(repr(result))
            return
        if any(t.layout != torch.strided for t in results):
            raise NotCapturableError(f"{func} gives a tensor of layout {results[0].layout}")
        is_list = isinstance(result, tuple | list)
        if func.overloadpacket in _DIVIDING:
            axis = by_name(func, *given).get("dim", 0)
            self.recording.divided.append(read[0].shape[axis])
        if varies:
            values = self._add(func, given, results, is_list)
        else:
            values = [Value.of_constant(t.detach()) for t in results]
            for index, value in enumerate(values):
                value.origin = Origin(func, given[0], given[1], index if is_list else None)
        used = _storages((args, kwargs))
        for index, (t, value) in enumerate(zip(results, values, strict=True)):
            if t in self._views:  # an argument itself
                continue
            if _storage(t) in used and (memory := self._memories.get(_storage(t))) is not None:
                steps: tuple[Any, ...] = (None,)
                source = self._views.get(args[0]) if isinstance(args[0], Tensor) else None
                if source is not None and source.memory is memory:
                    step = func, given[0][1:], given[1], index if is_list else -1
                    steps = source.steps if func in _SAME else (*source.steps, step)
                self._register(t, value, memory, steps)
            else:
                memory = self._new_memory(t, "result" if varies else "new")
                memory.is_blank = func.overloadpacket in _ALLOCATIONS
                self._register(t, value, memory)
                for other in used:
                    self._memories[other].is_blank = False
        self._sign_results(results)

    def _apply_to(self, func: Any, *args: Any) -> Value:
        return self._apply(func, [*args], {}, -1)

    def _note_expanded(self, results: Any, values: list[Value]) -> None:
        """Note the results of an operator that is recorded as others."""
        results = [t for t in leaves(results) if isinstance(t, Tensor) and t.numel()]
        for t, value in zip(results, values, strict=True):
            self._register(t, value, self._new_memory(t, "result"))
        self._sign_results(results)

    def _add(self, func: Any, given: Any, results: Any, is_list: bool) -> list[Value]:
        if func in _SAME or _is_inactive_dropout(func, given[0]):
            return [given[0][0]]
        values = [Value.like(t) for t in results]
        function = kernel_of(func) or _COPYING.get(func, func)
        self._operators.append(self._made(function, given, values, is_list))
        return values

    def _note_lifted(self, t: Tensor) -> None:
        """Note the numbers of a tensor that was made from Python's."""
        if t.numel() > _LARGEST_LIFTED:
            raise NotCapturableError(f"a tensor of {t.numel()} values is made outside of torch")
        if _storage(t) in self._memories:
            raise NotCapturableError("a tensor shares memory with another in an unknown way")
        self._register(t, Value.of_constant(t.detach()), self._new_memory(t, "new"))
        self._sign(repr(t.tolist()))

    # -- in-place operators ----------------------------------------------------------------------

    def _note_writing(
        self, func: Any, args: Any, given: Any, read: Any, varies: bool, result: Any
    ) -> None:
        """Record a kernel that writes to new tensors, or an in-place operator as another."""
        if kernel_of(func) is not None and varies:
            for t, argument in zip(args, func._schema.arguments, strict=False):
                if argument.is_write and not self._view_of(t).memory.is_blank:
                    raise NotCapturableError(f"{func} modifies a tensor that existed before")
            for t, argument in zip(args, func._schema.arguments, strict=False):
                if isinstance(t, Tensor) and not argument.is_write:
                    self._view_of(t).memory.is_blank = False
            self._operators.append(self._made(kernel_of(func), given, [], False))
            return
        target = args[0] if args else None
        if func is _aten.detach_.default:
            return
        if result is not target or not isinstance(target, Tensor):
            raise NotCapturableError(f"{func} modifies a tensor")
        view = self._view_of(target)
        view.memory.is_blank = False
        if view.memory.kind in ("input", "constant"):
            kind = "the input" if view.memory.kind == "input" else "a tensor that existed before"
            raise NotCapturableError(f"{func} modifies {kind}")
        if view.memory.kind == "new":  # computed already; whoever reads it next sees it
            view.memory.changes += 1
            return
        name, overload = func._schema.name.removeprefix("aten::"), func._overloadname
        packet = getattr(_aten, name.removesuffix("_"), None) if name.endswith("_") else None
        functional = getattr(packet, overload, None)
        if functional is None:
            raise NotCapturableError(f"{func} modifies a tensor")
        if functional is not _aten.copy.default and any(
            v.dtype != target.dtype and v.shape for v in read if v.dtype.is_floating_point
        ):
            raise NotCapturableError(f"{func} converts what it writes")
        if functional is _aten.copy.default and given[0][1].is_like(given[0][0]):
            value = given[0][1]
        else:
            value = self._apply(functional, given[0], given[1], -1, like=target)
        self._write(view, value)

    def _write(self, view: _View, value: Value) -> None:
        """Make a value that of a view, and so of what it is a view of."""
        memory = view.memory
        wholes = [memory.base]
        if None in view.steps:
            raise NotCapturableError("a view whose origin is unknown is modified")
        for func, args, kwargs, index in view.steps[:-1]:
            wholes.append(self._apply(func, [wholes[-1], *args], kwargs, index))
        written = value
        for whole, (func, args, kwargs, index) in zip(
            reversed(wholes), reversed(view.steps), strict=False
        ):
            written = self._scatter(func, whole, written, args, kwargs, index)
        memory.base = written
        memory.changes += 1
        view.value, view.changes = value, memory.changes

    def _scatter(
        self, func: Any, whole: Any, part: Value, args: Any, kwargs: Any, index: int
    ) -> Value:
        """A whole whose view, ``func(whole, *args)``, is replaced."""
        given = by_name(func, [whole, *args], kwargs)
        name = func.overloadpacket.__name__
        shape = list(whole.shape)
        if name in (
            "view",
            "_unsafe_view",
            "reshape",
            "flatten",
            "unflatten",
            "squeeze",
            "unsqueeze",
        ):
            return self._apply(_aten.reshape.default, [part, shape], {}, -1)
        if name == "view_as" and given:
            return self._apply(_aten.reshape.default, [part, shape], {}, -1)
        if name in ("transpose", "swapaxes"):
            return self._apply(_aten.transpose.int, [part, *args], {}, -1)
        if name in ("t", "numpy_T", "mT"):
            return self._apply(_aten.transpose.int, [part, -2, -1], {}, -1)
        if name == "permute":
            order = [d % len(shape) for d in given["dims"]]
            inverse = [order.index(axis) for axis in range(len(shape))]
            return self._apply(_aten.permute.default, [part, inverse], {}, -1)
        if name == "select":
            return self._apply(_aten.select_scatter.default, [whole, part, *args], kwargs, -1)
        if name == "slice":
            return self._apply(_aten.slice_scatter.default, [whole, part, *args], kwargs, -1)
        if name == "diagonal":
            return self._apply(_aten.diagonal_scatter.default, [whole, part, *args], kwargs, -1)
        if name == "narrow" and func is _aten.narrow.default:
            span = given["start"], given["start"] + given["length"]
            scatter = [whole, part, given["dim"], *span]
            return self._apply(_aten.slice_scatter.default, scatter, {}, -1)
        if name == "unbind":
            scatter = [whole, part, given["dim"], index]
            return self._apply(_aten.select_scatter.default, scatter, {}, -1)
        if name in ("split", "chunk", "split_with_sizes"):
            sizes = self._sizes(func, whole, args, kwargs, given["dim"])
            begin = sum(sizes[:index])
            scatter = [whole, part, given["dim"], begin, begin + sizes[index]]
            return self._apply(_aten.slice_scatter.default, scatter, {}, -1)
        raise NotCapturableError(f"a result of {func} is modified")

    def _sizes(self, func: Any, whole: Value, args: Any, kwargs: Any, dim: int) -> list[int]:
        with torch.device("meta"):
            parts = func(torch.empty(whole.shape, dtype=whole.dtype), *args, **kwargs)
        return [part.shape[dim] for part in parts]

    def _apply(
        self, func: Any, args: list[Any], kwargs: Any, index: int, like: Tensor | None = None
    ) -> Value:
        """The value of an operator that the call did not make itself."""
        if like is not None:
            values = [Value.like(like)]
        else:
            given = on_meta((args, kwargs))
            made = func(*given[0], **given[1])
            values = [Value.like(t) for t in (made if index >= 0 else [made])]
        function = _COPYING.get(func, func)
        if func in _SAME:
            return args[0]
        self._operators.append(self._made(function, (args, kwargs), values, index >= 0))
        self._kept += values
        for value in values:
            self._numbers.setdefault(id(value), len(self._numbers))
        return values[max(0, index)]

    # -- notes -----------------------------------------------------------------------------------

    def _made(self, func: Any, given: Any, results: list[Value], returns_list: bool) -> Operator:
        path, (args, kwargs) = self._caller(), given
        decisions = tuple(self._decisions.get(path, ()))
        operator = Operator(func, list(args), dict(kwargs), results, returns_list, path, decisions)
        for value in operator.values():
            value.users.append(operator)  # until the graph is made
        return operator

    def _sign(self, what: Any, *details: Any) -> None:
        self.recording.signature.append((what, *details))
        self.recording.outline.append((what, *details[:1]) if what == "constant" else what)

    def _sign_results(self, results: Sequence[Tensor]) -> None:
        self.recording.signature += [
            (t.shape, t.stride(), t.dtype, self._views[t].memory.number) for t in results
        ]

    def note_leaving(self, function: Any) -> None:
        """Note that a function gives Python the values or the memory of tensors."""
        owner, recording = function.__self__, self.recording
        if function is print:
            recording.fail("it prints")
        elif function.__name__ == "requires_grad_":
            self.leave("it asks for gradients")
        elif isinstance(owner, Tensor):
            view = self._views.get(owner)
            if view is not None and view.value.constant is None:
                recording.fail(f"{function.__name__} gives Python values of tensors")
        elif function.__name__.endswith("dlpack"):
            recording.fail(f"{function.__name__} gives Python values of tensors")

    def leave(self, reason: str) -> None:
        """Let autograd see the rest of the call, which is not recorded."""
        self.recording.fail(reason)
        for name in ("AutogradFunctionality", "AutogradOther", "AutogradNestedTensor"):
            key = getattr(torch._C.DispatchKey, name)
            torch._C._dispatch_tls_set_dispatch_key_excluded(key, False)

    def note_decision(self, decision: Decision) -> None:
        """Note a rule that a module consulted."""
        known = self._decisions.setdefault(self._caller(), [])
        if decision not in known:
            known.append(decision)

    def _caller(self) -> str:
        """The path of the module whose method made the call."""
        return next((self._paths[id(c)] for c in callers() if id(c) in self._paths), "")

    # -- the end ---------------------------------------------------------------------------------

    def finish(self, result: Any) -> None:
        """Note what the call returned."""
        recording = self.recording
        if recording.failure is not None:
            return
        try:
            structure, tensors = take_apart(result)
            outputs = []
            for t in tensors:
                view = self._view_of(t)
                value = view.value
                is_new = view.memory.kind != "constant"
                structure.note(t, view.memory.number, value, self._inputs, is_new=is_new)
                if structure.parts[-1].kind == "varying":
                    outputs.append(value)
                    is_made = view.memory.kind == "result"
                    if is_made and t.is_inference() != torch.is_inference_mode_enabled():
                        raise NotCapturableError("a result is made in another mode than the call's")
                self._sign("result", self._numbers[id(value)], t.shape, t.stride(), t.dtype)
        except Exception as error:
            recording.fail(_reason(error))
            return
        self._sign(structure.outline)
        if any(not t.numel() for t in (*self._inputs, *tensors)):
            recording.fail("it has tensors without values")
            return
        if not outputs:
            recording.fail("no result depends on the input")
            return
        for value in self._kept:
            value.users.clear()
        recording.structure = structure
        recording.graph = OperatorGraph(self.sources, self._operators, outputs)


def _reason(error: Exception) -> str:
    if isinstance(error, NotCapturableError):
        return str(error)
    return f"recording failed: {type(error).__name__}: {error}"


def clock() -> Callable[[], float]:
    """A function that returns the time in seconds, suited to torch's current number of threads.

    With a single thread, which never waits for others, this is the thread's CPU time, so other
    processes on a busy machine do not affect it. Otherwise it is wall-clock time.
    """
    fine = time.get_clock_info("thread_time").resolution <= _RESOLUTION
    return time.thread_time if fine and torch.get_num_threads() == 1 else time.perf_counter


def callers() -> Iterator[Any]:
    """The objects whose methods are running in this thread, the innermost first."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code.co_varnames[:1] == ("self",):
            yield frame.f_locals.get("self")
        frame = frame.f_back


def _signed(argument: Any) -> Hashable:
    """An argument as a part of a signature: of one type only, and integers as they are."""
    kind = type(argument)
    return kind.__name__, argument if kind is int else repr(argument)


def _storage(t: Any) -> int:
    return t.untyped_storage()._cdata if isinstance(t, Tensor) else 0


def _storages(args: Any) -> set[int]:
    return {_storage(leaf) for leaf in leaves(args)} - {0}


def _depends_on_values(func: Any, given: Any, read: list[Value]) -> bool:
    """Whether the shape of a result, or a number, depends on values; masks do as indices."""
    if func is _aten.index.Tensor:
        return any(v.dtype in (torch.bool, torch.uint8) for v in read[1:])
    if func.namespace != "aten" and kernel_of(func) is None:
        return _has_unknown_shape(func, given)
    return bool(_DEPENDS_ON_VALUES & {*func.tags})


def _has_unknown_shape(func: Any, given: Any) -> bool:
    """Whether the function that tells the shapes of another package's operator can't know them.

    Raises:
        NotCapturableError: it has no such function.
    """
    from torch._subclasses import FakeTensorMode  # which takes a while to import
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    with FakeTensorMode(shape_env=ShapeEnv()):
        args, kwargs = mapped(Value, lambda v: torch.empty(v.shape, dtype=v.dtype), given)
        try:
            made = func(*args, **kwargs)
        except Exception as error:
            raise NotCapturableError(f"nothing says which shape {func} gives") from error
    sizes = (n for t in leaves(made) if isinstance(t, Tensor) for n in t.shape)
    return any(isinstance(n, torch.SymInt) for n in sizes)


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
