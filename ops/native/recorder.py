"""What a piece of a network calls, with which memory: watched once, so that it can be repeated.

A recorder sees the functions of torch that Python calls and, through :func:`ops.native.load`, the
kernels; what either does inside stays closed. It knows of every tensor whether it came into being
while recording, where it then lies from call to call is free, or was there before, such as weights.
"""

from __future__ import annotations

import ctypes
import struct
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, resolve_name

from ops.native.record import (
    Block,
    Buffer,
    KernelCall,
    NotRecordableError,
    Place,
    TorchCall,
    View,
    tensors_in,
)

__all__ = ["Recorder", "recording"]

_NEW = {"torch.empty", "torch.empty_like", "torch.Tensor.new_empty"}
# They ask how tensors are laid out; what is in a tensor must not decide what is called.
_QUESTIONS = {
    *("torch.Tensor." + name for name in ("__len__", "dim", "element_size", "is_contiguous")),
    *("torch.Tensor." + name for name in ("is_floating_point", "is_inference", "numel", "size")),
    *("torch.Tensor." + name for name in ("storage_offset", "stride")),
    *(f"torch.Tensor.{name}.__get__" for name in ("_version", "device", "dtype", "is_cpu")),
    *(f"torch.Tensor.{name}.__get__" for name in ("nbytes", "ndim", "requires_grad", "shape")),
    *("torch.promote_types", "torch.sym_min", "torch.sym_max"),
}
# Their results follow from their arguments alone, and they change no argument.
_PURE = {
    *("torch.Tensor." + name for name in ("add", "clone", "contiguous", "div", "flatten", "float")),
    *("torch.Tensor." + name for name in ("index_select", "matmul", "mean", "mul", "remainder")),
    *("torch.Tensor." + name for name in ("sigmoid", "softmax", "sqrt", "sub", "sum", "to")),
    *("torch.Tensor." + name for name in ("reshape", "topk")),
    *("torch." + name for name in ("addcmul", "arange", "cat", "full_like", "minimum", "stack")),
    *("torch.nn.functional." + name for name in ("adaptive_avg_pool2d", "avg_pool2d")),
    *("torch.nn.functional." + name for name in ("batch_norm", "conv2d", "gelu", "hardsigmoid")),
    *("torch.nn.functional." + name for name in ("hardswish", "interpolate", "layer_norm")),
    *("torch.nn.functional." + name for name in ("leaky_relu", "linear", "pad", "relu", "silu")),
    *("torch.nn.functional." + name for name in ("pixel_shuffle", "softmax")),
    "torch.nn.functional.scaled_dot_product_attention",
    *("mkldnn." + name for name in ("_convolution_pointwise.default", "_linear_pointwise.binary")),
    "mkldnn._linear_pointwise.default",
}
# They change the argument that they return.
_IN_PLACE = {"torch.Tensor.add_", "torch.Tensor.mul_"}
# Their results, or some of them, lie where an argument does.
_VIEWS = {
    *("torch.Tensor." + name for name in ("__getitem__", "chunk", "contiguous", "detach")),
    *("torch.Tensor." + name for name in ("expand", "flatten", "float", "narrow", "permute")),
    *("torch.Tensor." + name for name in ("reshape", "split", "squeeze", "tensor_split", "to")),
    *("torch.Tensor." + name for name in ("transpose", "unbind", "unflatten", "unsqueeze", "view")),
}


class _Recording(threading.local):
    recorder: Recorder | None = None


_recording = _Recording()


def recording() -> Recorder | None:
    """The recorder that watches this thread, if there is one."""
    return _recording.recorder


class Recorder(TorchFunctionMode):
    """Watches what is called with an input, and what follows from it, while it is entered.

    It changes nothing of what it watches, also where that turns out not to be recordable.

    Args:
        x: the input.

    Attributes:
        failure: why what was called cannot be repeated; then the rest was not recorded.
        calls: in their order.
        buffers: the memory that they work on; the first is the input's.
        constants: what else they read; it must be kept.
    """

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.failure: NotRecordableError | None = None
        self.calls: list[KernelCall | TorchCall] = []
        self.buffers = [_buffer(x)]
        self.constants: list[Any] = []
        self._by_storage = {_memory(x): 0}  # those of tensors that there are
        self._ranges: list[tuple[int, int]] = []  # of constants whose addresses were taken
        self._addresses: dict[int, Tensor] = {}  # taken since the last call of a kernel
        # What tells when memory is free again, and another tensor may come to lie there.
        self._ends: list[weakref.finalize[Any, Any]] = []

    def __enter__(self) -> Recorder:
        _recording.recorder = self
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        _recording.recorder = None
        for end in self._ends:
            end.detach()
        super().__exit__(*error)

    def watch(self, library: ctypes.CDLL) -> Any:
        """A kernel's library whose calls are recorded."""
        return _Watched(library, self)

    def finish(self, result: Any) -> View:
        """The result's place.

        Raises:
            NotRecordableError: something called cannot be repeated, or the result is no tensor that
                came into being.
        """
        if self.failure is not None:
            raise self.failure
        if not isinstance(result, Tensor):
            raise NotRecordableError(f"the result is a {type(result).__name__}")
        if any(self._index(t) is not None for t in self._addresses.values()):
            raise NotRecordableError("an address was taken, and no kernel called with it")
        view = self._argument(result)
        if not isinstance(view, View):
            raise NotRecordableError("the result does not follow from the input")
        return view

    # -- functions of torch ----------------------------------------------------------------------

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
            except NotRecordableError as error:
                self.failure = error

    def _note_function(self, func: Any, args: Any, kwargs: dict[str, Any], result: Any) -> None:
        name = str(func) if isinstance(func, torch._ops.OpOverload) else resolve_name(func)
        if name == "torch.Tensor.data_ptr":
            self._take_address(args[0], result)
        elif isinstance(result, Tensor):
            self._note(name, func, args, kwargs, (result,))
        elif _is_tensors(result):
            self._note(name, func, args, kwargs, tuple(result))
        elif name not in _QUESTIONS:
            raise NotRecordableError(f"{name} gives a {type(result).__name__}")

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
            raise NotRecordableError(f"{name} gives an empty tensor")
        inputs = {_memory(t) for t in tensors_in((args, kwargs))}
        fresh = {s: i for i, s in enumerate(storages) if s not in inputs}
        if name in _NEW:
            self._add_buffer(results[0])
            return
        if not fresh and (name in _VIEWS or _drops_nothing(name, args, kwargs)):
            return
        call = TorchCall(str(name), func, self._arguments(args), self._arguments(kwargs))
        if name not in (_PURE if fresh else _PURE | _IN_PLACE) or 0 < len(fresh) < len(results):
            raise NotRecordableError(f"{name} is not known to repeat")
        if not fresh and self._index(results[0]) is None:
            raise NotRecordableError(f"{name} changes what was there before")
        for i in fresh.values():
            call.results[i] = self._add_buffer(results[i])
        self.calls.append(call)

    def _add_buffer(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        if tensor.data_ptr() != storage.data_ptr():
            raise NotRecordableError("a new tensor does not begin where its memory does")
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
            raise NotRecordableError("a tensor has another dtype, or begins before the input")
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

    def _take_address(self, t: Tensor, address: int) -> None:
        self._addresses[address] = t
        if self._index(t) is None:
            storage = t.untyped_storage()
            self.constants.append(storage)
            self._ranges.append((storage.data_ptr(), storage.data_ptr() + storage.nbytes()))

    def call_kernel(self, function: Any, args: tuple[Any, ...]) -> Any:
        """Calls it and notes the call."""
        with torch._C.DisableTorchFunction():  # what follows asks torch, too
            self._try(self._note_kernel, function, args)
        return function(*args)

    def _note_kernel(self, function: Any, args: tuple[Any, ...]) -> None:
        address = ctypes.cast(function, ctypes.c_void_p).value
        assert address is not None
        call = KernelCall(address, [self._kernel_argument(a) for a in args])
        used = {place.buffer for place in call.places()}
        for t in self._addresses.values():
            index = self._index(t)
            if index is not None and index not in used:
                raise NotRecordableError("an address was taken that the kernel is not given")
        self._addresses.clear()
        self.calls.append(call)

    def _kernel_argument(self, argument: Any) -> int | Place | Block:
        if argument is None:
            return 0
        if isinstance(argument, int):
            return argument
        if isinstance(argument, bytes):
            # Of which numbers are addresses, only those that were taken just now tell.
            words = struct.unpack(f"={len(argument) // 8}Q", argument)
            found = ((8 * i, w) for i, w in enumerate(words) if w in self._addresses)
            return self._block(argument, found)
        if isinstance(argument, ctypes.c_void_p):
            return self._place(argument.value or 0) or argument.value or 0
        if isinstance(argument, ctypes.c_int64):
            return argument.value
        pointed = getattr(argument, "_obj", argument)  # by ctypes.byref
        if pointed is argument and not isinstance(argument, ctypes.Array):
            raise NotRecordableError(f"a kernel takes a {type(argument).__name__}")
        data = ctypes.string_at(ctypes.addressof(pointed), ctypes.sizeof(pointed))
        offsets = _pointers_in(type(pointed))
        return self._block(
            data, ((at, int.from_bytes(data[at : at + 8], "little")) for at in offsets)
        )

    def _block(self, data: bytes, pointers: Iterator[tuple[int, int]]) -> Block:
        places = ((at, self._place(address)) for at, address in pointers if address)
        return Block(data, tuple((at, place) for at, place in places if place is not None))

    def _place(self, address: int) -> Place | None:
        """None for a constant's."""
        for index in self._by_storage.values():
            buffer = self.buffers[index]
            if buffer.start <= address < buffer.end:
                return Place(index, address - buffer.start)
        if address and not any(start <= address < end for start, end in self._ranges):
            raise NotRecordableError("a kernel is given an address of which nothing is known")
        return None


class _Watched:
    """A library whose functions are called through a recorder."""

    def __init__(self, library: ctypes.CDLL, recorder: Recorder) -> None:
        self._library, self._recorder = library, recorder

    def __getattr__(self, name: str) -> Callable[..., Any]:
        function = getattr(self._library, name)
        if name.endswith("_multiplies_bfloat16"):
            return function
        return lambda *args: self._recorder.call_kernel(function, args)


def _pointers_in(kind: Any) -> Iterator[int]:
    """Where pointers are in a structure or an array, in bytes."""
    if kind is ctypes.c_void_p:
        yield 0
    elif issubclass(kind, ctypes.Structure):
        for name, of, *_ in kind._fields_:
            start = getattr(kind, name).offset
            yield from (start + at for at in _pointers_in(of))
    elif issubclass(kind, ctypes.Array):
        step = ctypes.sizeof(kind._type_)
        inner = list(_pointers_in(kind._type_))
        yield from (i * step + at for i in range(kind._length_) for at in inner)


def _is_tensors(result: Any) -> bool:
    return isinstance(result, tuple | list) and {type(r) for r in result} == {Tensor}


def _buffer(t: Tensor) -> Buffer:
    storage = t.untyped_storage()
    end = storage.data_ptr() + storage.nbytes()
    return Buffer(tuple(t.shape), t.stride(), t.dtype, t.data_ptr(), end)


def _drops_nothing(name: str | None, args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether it is dropout that gives its input back."""
    training = args[2] if len(args) > 2 else kwargs.get("training", True)
    return name == "torch.nn.functional.dropout" and not training


def _memory(t: Tensor) -> int:
    """Where its storage begins; weights that oneDNN packed have none that could be seen."""
    return -1 if t.is_mkldnn else t.untyped_storage().data_ptr()
