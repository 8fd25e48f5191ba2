"""Capture: records one call of a module, with the memory it uses, so that it can be replayed.

A capture records the operators of torch that are called below autograd and, as an observer of
:mod:`ops.cpu.call.binding`, the kernels with their tensors, but nothing that happens inside either.
That the calls are the same for any input is known from their recording
(:mod:`ops.rewriting.recorder`). A capture distinguishes tensors allocated while it lasts,
which a replay may place anywhere, from tensors that existed before, such as weights.
"""

from __future__ import annotations

import ctypes
import struct
import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from ops.cpu.call.binding import Kernel, kernel_of, observed_by
from ops.fuse.nested import mapped
from ops.replay.graph import (
    Block,
    Buffer,
    Graph,
    KernelCall,
    NotCapturableError,
    Place,
    TorchCall,
    View,
    tensors_in,
)

_aten = torch.ops.aten
_ALLOCATIONS = {_aten.empty, _aten.empty_like, _aten.empty_strided, _aten.new_empty}


def allocates(operator: OpOverload) -> bool:
    """Whether an operator only allocates memory."""
    return operator.overloadpacket in _ALLOCATIONS


class _Mode(TorchDispatchMode):
    def __init__(self, capture: Capture) -> None:
        super().__init__()
        self._capture = capture

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kernel = kernel_of(func)
        if kernel is None:
            return self._capture.call(func, args, kwargs or {})
        with self:  # its copies and results are buffers, too
            return kernel.run(*args, **(kwargs or {}))


class Capture:
    """Context manager that records the calls made on inputs and on tensors computed from them.

    The recorded calls run unchanged, even if they turn out not to be capturable.

    Args:
        inputs: distinct tensors that share no memory.

    Attributes:
        failure: why the calls cannot be replayed; recording stops at the first failure.
        calls, buffers, constants: of the :class:`ops.replay.graph.Graph`.
    """

    def __init__(self, *inputs: Tensor) -> None:
        self.failure: NotCapturableError | None = None
        self.calls: list[KernelCall | TorchCall] = []
        self.buffers = [*map(_buffer, inputs)]
        self.constants: list[Any] = []
        # Buffer indices of live storages.
        self._by_storage = {_memory(x): i for i, x in enumerate(inputs)}
        self._inputs = len(inputs)

    def __enter__(self) -> Any:
        with ExitStack() as entered:
            entered.enter_context(observed_by(self))
            # Below autograd, operators such as a linear layer are seen whole.
            entered.enter_context(torch._C._AutoDispatchBelowAutograd())
            entered.enter_context(_Mode(self))
            self._entered = entered.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._entered.__exit__(*error)

    def finish(self, result: Any) -> Graph:
        """The graph that returns ``result``, a tensor or several of them in a structure.

        Raises:
            NotCapturableError: a call cannot be replayed, or no tensor was computed from the input.
        """
        if self.failure is not None:
            raise self.failure
        graph = Graph(
            self.calls,
            self.buffers,
            self.constants,
            mapped(Tensor, self._argument, result),
            self._inputs,
        )
        if not graph.results:
            raise NotCapturableError(
                f"the result, a {type(result).__name__}, does not depend on the input"
            )
        return graph

    # -- operators of torch ----------------------------------------------------------------------

    def call(self, operator: OpOverload, args: Any, kwargs: dict[str, Any]) -> Any:
        """Call an operator and record it."""
        before = len(self.calls)
        result = operator(*args, **kwargs)
        if len(self.calls) > before:
            self.failure = NotCapturableError(f"{operator} calls kernels")
        self._try(self._note, operator, args, kwargs, result)
        return result

    def _try(self, note: Callable[..., None], *what: Any) -> None:
        if self.failure is None:
            try:
                note(*what)
            except NotCapturableError as error:
                self.failure = error

    def _note(self, operator: OpOverload, args: Any, kwargs: dict[str, Any], result: Any) -> None:
        results = (result,) if isinstance(result, Tensor) else result
        if not _is_tensors(results):
            return
        if any(r.is_mkldnn for r in results):
            raise NotCapturableError(f"{operator} packs a weight")
        storages = [_memory(r) for r in results]
        if not any(r.numel() for r in results):
            return  # the same in every call
        inputs = {_memory(t) for t in tensors_in((args, kwargs))}
        fresh = [i for i, s in enumerate(storages) if s not in inputs]
        mutable = operator._schema.is_mutable
        if allocates(operator):
            self._add_buffer(results[0])
            return
        if not fresh and not mutable:
            return  # views
        if 0 < len(fresh) < len(results):
            raise NotCapturableError(f"{operator} cannot be replayed")
        given = mapped(Tensor, self._argument, (args, kwargs))
        call = TorchCall(operator, *given)
        for i in fresh:
            call.results[i] = self._add_buffer(results[i])
        self.calls.append(call)

    def _add_buffer(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        if tensor.data_ptr() != storage.data_ptr():
            raise NotCapturableError("a new tensor does not begin where its memory does")
        index = len(self.buffers)
        self.buffers.append(_buffer(tensor))
        self._by_storage[storage.data_ptr()] = index
        # Forget it once it is freed: a new tensor may get its address.
        weakref.finalize(storage, self._by_storage.pop, storage.data_ptr()).atexit = False
        return index

    def _index(self, t: Tensor) -> int | None:
        """The buffer of a tensor; None of a constant, which is kept alive."""
        index = self._by_storage.get(_memory(t))
        if index is None:
            self.constants.append(t if t.is_mkldnn else t.untyped_storage())
        return index

    def _argument(self, t: Tensor) -> View | Tensor:
        index = self._index(t)
        if index is None:
            return t
        buffer = self.buffers[index]
        offset = t.data_ptr() - buffer.start
        if t.dtype != buffer.dtype or offset < 0:
            raise NotCapturableError("a tensor has a different dtype, or starts before the input")
        return View(index, tuple(t.shape), t.stride(), offset // t.element_size())

    # -- kernels ---------------------------------------------------------------------------------

    def kernel_called(self, kernel: Kernel, function: Any, arguments: Sequence[Any]) -> None:
        """Record a kernel call with its tensors."""
        self._try(self._note_kernel_call, function, arguments)

    def kernel_returned(self, kernel: Kernel, given: dict[str, Any], result: Any) -> None:
        """Do nothing: the call has already been recorded."""

    def _note_kernel_call(self, function: Any, arguments: Sequence[Any]) -> None:
        address = ctypes.cast(function, ctypes.c_void_p).value
        assert address is not None
        self.calls.append(KernelCall(address, [*map(self._kernel_argument, arguments)]))

    def _kernel_argument(self, argument: Any) -> int | Place | Block:
        if isinstance(argument, int):
            return argument
        if isinstance(argument, Tensor):
            return self._place_of(argument)
        found = [w if isinstance(w, int) else self._place_of(*w) for w in argument]
        places = tuple((8 * i, w) for i, w in enumerate(found) if isinstance(w, Place))
        numbers = [0 if isinstance(w, Place) else w for w in found]
        return Block(struct.pack(f"={len(numbers)}q", *numbers), places)

    def _place_of(self, t: Tensor, offset: int = 0) -> int | Place:
        """The place of a tensor in a buffer, or the address of a constant."""
        index = self._index(t)
        if index is None:
            return t.data_ptr() + offset
        return Place(index, t.data_ptr() + offset - self.buffers[index].start)


def _is_tensors(result: Any) -> bool:
    return isinstance(result, tuple | list) and all(isinstance(r, Tensor) for r in result)


def _buffer(t: Tensor) -> Buffer:
    storage = t.untyped_storage()
    end = storage.data_ptr() + storage.nbytes()
    return Buffer(tuple(t.shape), t.stride(), t.dtype, t.data_ptr(), end)


def _memory(t: Tensor) -> int:
    """The address of a tensor's storage; -1 for weights packed by oneDNN, which expose none."""
    return -1 if t.is_mkldnn else t.untyped_storage().data_ptr()
