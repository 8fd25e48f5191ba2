"""Capture: records one call of a module, with the memory it uses, so that it can be replayed.

A capture records the torch functions called from Python and, as an observer of
:mod:`ops.cpu.binding`, the kernels with their tensors, but nothing that happens inside either. It
distinguishes tensors allocated during the capture, which a replay may place anywhere, from tensors
that existed before, such as weights.
"""

from __future__ import annotations

import ctypes
import functools
import struct
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils import _pytree as pytree

from ops.cpu.binding import Kernel, observed_by
from ops.cpu.call import words_of
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

__all__ = ["ALLOCATIONS", "Capture", "name_of"]

ALLOCATIONS = {"torch.empty", "torch.empty_like", "torch.Tensor.new_empty"}
# Queries of a tensor's metadata. Queries of its values, which could change the sequence of calls,
# must not be listed.
_QUERIES = {
    *("torch.Tensor." + name for name in ("__len__", "dim", "element_size", "is_contiguous")),
    *("torch.Tensor." + name for name in ("is_floating_point", "is_inference", "numel", "size")),
    *("torch.Tensor." + name for name in ("storage_offset", "stride")),
    *(f"torch.Tensor.{name}.__get__" for name in ("_version", "device", "dtype", "is_cpu")),
    *(f"torch.Tensor.{name}.__get__" for name in ("nbytes", "ndim", "requires_grad", "shape")),
    *(f"torch.Tensor.{name}.__get__" for name in ("is_nested", "layout")),
    "torch.promote_types",
}
# Functions whose results depend only on their arguments, and which modify no argument.
_PURE = {
    *("torch.Tensor." + name for name in ("add", "clone", "contiguous", "div", "flatten", "float")),
    *("torch.Tensor." + name for name in ("index_select", "matmul", "mean", "mul", "remainder")),
    *("torch.Tensor." + name for name in ("sigmoid", "softmax", "sqrt", "sub", "sum", "to")),
    *("torch.Tensor." + name for name in ("clamp", "exp", "new_zeros", "norm", "reshape")),
    *("torch.Tensor." + name for name in ("tanh", "topk")),
    *("torch." + name for name in ("addcmul", "arange", "cat", "full_like", "minimum", "stack")),
    *("torch.nn.functional." + name for name in ("adaptive_avg_pool2d", "avg_pool2d", "relu6")),
    *("torch.nn.functional." + name for name in ("batch_norm", "conv2d", "gelu", "hardsigmoid")),
    *("torch.nn.functional." + name for name in ("hardswish", "interpolate", "layer_norm")),
    *("torch.nn.functional." + name for name in ("leaky_relu", "linear", "pad", "relu", "silu")),
    *("torch.nn.functional." + name for name in ("group_norm", "pixel_shuffle", "softmax")),
    *("torch.nn.functional." + name for name in ("conv1d", "max_pool2d")),
    "torch.nn.functional.scaled_dot_product_attention",
    *("mkldnn." + name for name in ("_convolution_pointwise.default", "_linear_pointwise.binary")),
    "mkldnn._linear_pointwise.default",
}
# Functions that modify and return an argument.
_IN_PLACE = {
    *("torch.Tensor." + name for name in ("add_", "mul_", "relu_", "sigmoid_", "square_", "tanh_")),
}
# Functions whose results may share memory with an argument.
_VIEWS = {
    *("torch.Tensor." + name for name in ("__getitem__", "chunk", "contiguous", "detach")),
    *(
        "torch.Tensor." + name
        for name in ("expand", "flatten", "float", "movedim", "narrow", "permute")
    ),
    *("torch.Tensor." + name for name in ("reshape", "split", "squeeze", "tensor_split", "to")),
    *("torch.Tensor." + name for name in ("transpose", "unbind", "unflatten", "unsqueeze", "view")),
    "torch.Tensor.mT.__get__",
}


class Capture(TorchFunctionMode):
    """Context manager that records the calls made on an input and on tensors computed from it.

    The recorded calls run unchanged, even if they turn out not to be capturable.

    Args:
        x: the input.

    Attributes:
        failure: why the calls cannot be replayed; recording stops at the first failure.
        calls, buffers, constants: of the :class:`ops.replay.graph.Graph`.
    """

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.failure: NotCapturableError | None = None
        self.calls: list[KernelCall | TorchCall] = []
        self.buffers = [_buffer(x)]
        self.constants: list[Any] = []
        self._by_storage = {_memory(x): 0}  # buffer indices of live storages
        # Finalizers that forget freed storages, since new tensors may reuse their addresses.
        self._ends: list[weakref.finalize[Any, Any]] = []

    def __enter__(self) -> Capture:
        self._observed = observed_by(self)
        self._observed.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self._observed.__exit__(*error)
        for end in self._ends:
            end.detach()
        super().__exit__(*error)

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
            pytree.tree_map_only(Tensor, self._argument, result),
        )
        if not graph.results:
            raise NotCapturableError(
                f"the result, a {type(result).__name__}, does not follow from the input"
            )
        return graph

    # -- torch functions -------------------------------------------------------------------------

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self._try(self._note_function, func, args, kwargs, result)
        return result

    def _try(self, note: Callable[..., None], *what: Any) -> None:
        if self.failure is None:
            try:
                note(*what)
            except NotCapturableError as error:
                self.failure = error

    def _note_function(self, func: Any, args: Any, kwargs: dict[str, Any], result: Any) -> None:
        name = name_of(func)
        if isinstance(result, Tensor):
            self._note(name, func, args, kwargs, (result,))
        elif _is_tensors(result):
            self._note(name, func, args, kwargs, tuple(result))
        elif name not in _QUERIES:
            raise NotCapturableError(f"{name} gives a {type(result).__name__}")

    def _note(
        self,
        name: str | None,
        func: Callable[..., Any],
        args: Any,
        kwargs: dict[str, Any],
        results: tuple[Tensor, ...],
    ) -> None:
        storages = [_memory(r) for r in results]
        if 0 in storages:
            raise NotCapturableError(f"{name} gives an empty tensor")
        inputs = {_memory(t) for t in tensors_in((args, kwargs))}
        fresh = {s: i for i, s in enumerate(storages) if s not in inputs}
        if name in ALLOCATIONS:
            self._add_buffer(results[0])
            return
        is_view = isinstance(func, OpOverload) and not func._schema.is_mutable
        if not fresh and (is_view or name in _VIEWS or _is_inactive_dropout(name, args, kwargs)):
            return
        call = TorchCall(str(name), func, self._arguments(args), self._arguments(kwargs))
        if not _is_known(func, name, fresh) or 0 < len(fresh) < len(results):
            raise NotCapturableError(f"{name} is not known to replay")
        if not fresh and self._index(results[0]) is None:
            raise NotCapturableError(f"{name} changes what was there before")
        for i in fresh.values():
            call.results[i] = self._add_buffer(results[i])
        self.calls.append(call)

    def _add_buffer(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        if tensor.data_ptr() != storage.data_ptr():
            raise NotCapturableError("a new tensor does not begin where its memory does")
        index = len(self.buffers)
        self.buffers.append(_buffer(tensor))
        self._by_storage[storage.data_ptr()] = index
        self._ends.append(weakref.finalize(storage, self._by_storage.pop, storage.data_ptr()))
        return index

    def _index(self, t: Tensor) -> int | None:
        return self._by_storage.get(_memory(t))

    def _argument(self, t: Tensor) -> View | Tensor:
        index = self._index(t)
        if index is None:
            return t
        buffer = self.buffers[index]
        offset = t.data_ptr() - buffer.start
        if t.dtype != buffer.dtype or offset < 0:
            raise NotCapturableError("a tensor has another dtype, or begins before the input")
        return View(index, tuple(t.shape), t.stride(), offset // t.element_size())

    def _arguments(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._argument(value)
        if isinstance(value, dict):
            return {key: self._arguments(v) for key, v in value.items()}
        if isinstance(value, tuple | list) and any(True for _ in tensors_in(value)):
            return [self._arguments(v) for v in value]
        return value

    # -- kernels ---------------------------------------------------------------------------------

    def kernel_called(self, kernel: Kernel, function: Any, arguments: Sequence[Any]) -> None:
        """Record a kernel call with its tensors."""
        with torch._C.DisableTorchFunction():  # don't record the queries below
            self._try(self._note_kernel_call, kernel, function, arguments)

    def kernel_returned(self, kernel: Kernel, given: dict[str, Any], result: Any) -> None:
        """Do nothing: the call has already been recorded."""

    def _note_kernel_call(self, kernel: Kernel, function: Any, arguments: Sequence[Any]) -> None:
        address = ctypes.cast(function, ctypes.c_void_p).value
        assert address is not None
        self.calls.append(
            KernelCall(address, [*map(self._kernel_argument, arguments)], kernel.name)
        )

    def _kernel_argument(self, argument: Any) -> int | Place | Block:
        if isinstance(argument, int):
            return argument
        if isinstance(argument, Tensor):
            return self._place_of(argument)
        words = words_of(argument)
        if words is None:
            return Block(bytes(argument), ())
        found = [w if isinstance(w, int) else self._place_of(*w) for w in words]
        places = tuple((8 * i, w) for i, w in enumerate(found) if isinstance(w, Place))
        numbers = [0 if isinstance(w, Place) else w for w in found]
        return Block(struct.pack(f"={len(numbers)}q", *numbers), places)

    def _place_of(self, t: Tensor, offset: int = 0) -> int | Place:
        """The place of a tensor in a buffer, or the address of a constant, which is kept alive."""
        index = self._index(t)
        if index is None:
            self.constants.append(t.untyped_storage())
            return t.data_ptr() + offset
        return Place(index, t.data_ptr() + offset - self.buffers[index].start)


@functools.lru_cache(maxsize=1024)
def name_of(func: Any) -> str | None:
    """The name of a torch function; cached, since ``resolve_name`` sets up warning filters."""
    return str(func) if isinstance(func, torch._ops.OpOverload) else resolve_name(func)


def _is_known(func: Any, name: str | None, fresh: dict[int, int]) -> bool:
    """Whether a function's results depend only on its arguments, of which it changes no others."""
    if isinstance(func, OpOverload) and func.namespace == "aten":
        return not func._schema.is_mutable
    return name in (_PURE if fresh else _PURE | _IN_PLACE)


def _is_tensors(result: Any) -> bool:
    return isinstance(result, tuple | list) and {type(r) for r in result} == {Tensor}


def _buffer(t: Tensor) -> Buffer:
    storage = t.untyped_storage()
    end = storage.data_ptr() + storage.nbytes()
    return Buffer(tuple(t.shape), t.stride(), t.dtype, t.data_ptr(), end)


def _is_inactive_dropout(name: str | None, args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether this is dropout outside training, which returns its input."""
    training = args[2] if len(args) > 2 else kwargs.get("training", True)
    return name == "torch.nn.functional.dropout" and not training


def _memory(t: Tensor) -> int:
    """The address of a tensor's storage; -1 for weights packed by oneDNN, which expose none."""
    return -1 if t.is_mkldnn else t.untyped_storage().data_ptr()
