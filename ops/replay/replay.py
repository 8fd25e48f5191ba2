"""Replay: runs a graph with preplanned memory, many kernels per call from Python."""

from __future__ import annotations

import ctypes
import functools
import operator
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ops.cpu.build import load, unavailable_reason
from ops.replay.graph import (
    Block,
    Buffer,
    Graph,
    KernelCall,
    NotCapturableError,
    Place,
    TorchCall,
    View,
    is_view,
)
from ops.replay.lowering import lowered
from ops.replay.memory_plan import plan_memory
from ops.replay.workspace import workspace

_KERNEL = "replay"
_VALUE, _PLACE, _BLOCK = range(3)  # as in ops/cpu/replay/replay.cpp
# Tensors allocated by torch are released at once from this size on, and otherwise at the next torch
# call, so that lists of kernels are not split.
_LARGE_BYTES = 4 << 20

_BYTES_OF_A_WORD, _BYTES_OF_A_STEP = 64, 4 << 10

_Tensors = list[Any]  # of buffers, during a replay
_Step = Callable[[_Tensors, Any], object]


class Replay:
    """A graph that can be run on inputs of the same shape, strides and dtype.

    Consecutive kernels are called from a list, without Python in between. Intermediate buffers
    share one workspace, except those that torch allocates. Thread-safe.

    Args:
        graph: the captured graph.
        between_calls: called before the first call of the graph and after each; kernels are then
            called one by one.

    Attributes:
        plan: the memory plan.
        lowered: indices of the torch calls that a kernel replaces.

    Raises:
        NotCapturableError: a call's arguments are larger than the list supports.
    """

    def __init__(self, graph: Graph, between_calls: Callable[[], object] | None = None) -> None:
        library = load(_KERNEL)
        if library is None:
            raise NotCapturableError(f"there is no kernel: {unavailable_reason(_KERNEL)}")
        self._run = library.replay_run
        library.replay_scratch_bytes.restype = ctypes.c_int64
        self._scratch_bytes = library.replay_scratch_bytes()
        self._buffers, self._constants = graph.buffers, graph.constants
        calls: list[KernelCall | TorchCall] = []
        self.lowered: list[int] = []
        for index, call in enumerate(graph.calls):
            other = lowered(call, self._buffers) if isinstance(call, TorchCall) else None
            if other is not None:
                self.lowered.append(index)
            calls.append(other or call)
        kept = {view.buffer for view in graph.results}
        self.plan = plan_memory(calls, self._buffers, kept, graph.inputs)
        self._blocks: list[Any] = []  # kept alive: the list holds their addresses
        self._words: list[int] = []
        self._begun = 0  # start of the words that are not part of a step yet
        self._steps: list[_Step] = []
        self._write(calls, between_calls)
        # What torch reads, and results.
        self._new = [
            (i, self._tensor_of(i))
            for i, use in enumerate(self.plan.uses)
            if i >= graph.inputs
            if not use.made and use.last >= 0 and (use.by_torch or i not in self.plan.offsets)
        ]
        self._result = self._result_of(graph.result)
        self._code = (ctypes.c_int64 * len(self._words))(*self._words)
        self._code_address = ctypes.addressof(self._code)
        self._count = len(self._buffers)
        self._bases = ctypes.c_void_p * (self._count + 1)  # the last is the workspace
        del self._buffers

    @property
    def nbytes(self) -> int:
        """About the memory of the list of calls; weights and the workspace are shared."""
        return _BYTES_OF_A_WORD * len(self._words) + _BYTES_OF_A_STEP * len(self._steps)

    def __call__(self, *inputs: Tensor) -> Any:
        """Run the graph on inputs and return its result.

        Raises:
            MemoryError: a kernel cannot allocate its scratch buffer.
        """
        tensors: _Tensors = [None] * self._count
        bases = self._bases()
        for index, x in enumerate(inputs):
            tensors[index], bases[index] = x, x.data_ptr()
        with workspace.borrow(self.plan.nbytes) as shared:
            bases[self._count] = shared.data_ptr()
            for index, new in self._new:
                tensors[index] = made = new(shared)
                bases[index] = made.data_ptr()
            for step in self._steps:
                step(tensors, bases)
        return self._result(tensors)

    def _result_of(self, result: Any) -> Callable[[_Tensors], Any]:
        """A function that returns the result."""
        if isinstance(result, View):
            return _reader(result, self._buffers[result.buffer])
        leaves, structure = pytree.tree_flatten(result, is_leaf=is_view)
        read = [self._filler(leaf) for leaf in leaves]
        return lambda tensors: pytree.tree_unflatten([r(tensors) for r in read], structure)

    # -- writing the steps -----------------------------------------------------------------------

    def _write(
        self, calls: Sequence[KernelCall | TorchCall], between: Callable[[], object] | None
    ) -> None:
        def end_call() -> None:
            if between is not None:
                self._end_list()
                self._steps.append(lambda tensors, bases: between())

        end_call()
        ends = defaultdict(list)  # buffers that torch allocates by their last call
        for i, use in enumerate(self.plan.uses):
            if use.made:
                ends[use.last].append(i)
        free: list[int] = []  # allocated by torch and no longer needed
        for now, call in enumerate(calls):
            if isinstance(call, TorchCall):
                self._end_list()
                self._steps.append(self._torch_step(call))
            else:
                self._write_call(call)
            free += ends[now]
            large = any(self._buffers[i].nbytes >= _LARGE_BYTES for i in free)
            if free and (isinstance(call, TorchCall) or large):
                self._end_list()
                self._steps.append(functools.partial(_release, free))
                free = []
            end_call()
        self._end_list()

    def _tensor_of(self, index: int) -> Callable[[Tensor], Tensor]:
        """A function that gives a buffer's tensor, in the workspace or in its own memory."""
        buffer, offset = self._buffers[index], self.plan.offsets.get(index)
        size, stride, dtype = buffer.size, buffer.stride, buffer.dtype
        if offset is None:
            return lambda shared: torch.empty_strided(size, stride, dtype=dtype)
        end = offset + buffer.nbytes
        return lambda shared: shared[offset:end].view(dtype).as_strided(size, stride)

    def _end_list(self) -> None:
        begun, self._begun = self._begun, len(self._words)
        if self._begun > begun:
            self._steps.append(functools.partial(self._run_list, 8 * begun, 8 * self._begun))

    def _run_list(self, begin: int, end: int, tensors: _Tensors, bases: Any) -> None:
        start = self._code_address
        if self._run(ctypes.c_void_p(start + begin), ctypes.c_void_p(start + end), bases):
            raise MemoryError("no memory for the scratch of a kernel")

    def _torch_step(self, call: TorchCall) -> _Step:
        read, read_named = self._filler(call.args), self._filler(call.kwargs)
        function, made = call.function, list(call.results.items())

        def step(tensors: _Tensors, bases: Any) -> None:
            results = function(*read(tensors), **read_named(tensors))
            for i, buffer in made:
                tensors[buffer] = result = results if isinstance(results, Tensor) else results[i]
                bases[buffer] = result.data_ptr()

        return step

    def _filler(self, value: Any) -> Callable[[_Tensors], Any]:
        """A function that replaces the views in a value by tensors."""
        if isinstance(value, View):
            return _reader(value, self._buffers[value.buffer])
        if isinstance(value, dict):
            fillers = {key: self._filler(v) for key, v in value.items()}
            return lambda tensors: {key: fill(tensors) for key, fill in fillers.items()}
        if isinstance(value, tuple | list):
            parts = [self._filler(v) for v in value]
            return lambda tensors: [fill(tensors) for fill in parts]
        return lambda tensors: value

    def _write_call(self, call: KernelCall) -> None:
        if not 2 <= len(call.arguments) <= 4:
            raise NotCapturableError(f"a kernel takes {len(call.arguments)} arguments")
        self._words += (call.function, len(call.arguments))
        scratch = 0
        for argument in call.arguments:
            if isinstance(argument, Place):
                self._words += (_PLACE, *self._base(argument))
            elif isinstance(argument, Block):
                scratch += -(-len(argument.data) // 16) * 16 if argument.places else 0
                self._write_block(argument)
            else:
                self._words += (_VALUE, argument)
        if scratch > self._scratch_bytes:
            raise NotCapturableError(f"the arguments of a kernel take {scratch} bytes")

    def _write_block(self, block: Block) -> None:
        kept = ctypes.create_string_buffer(block.data, len(block.data))
        self._blocks.append(kept)
        address = ctypes.addressof(kept)
        if not block.places:
            self._words += (_VALUE, address)
            return
        self._words += (_BLOCK, address, len(block.data), len(block.places))
        for at, place in block.places:
            self._words += (at, *self._base(place))

    def _base(self, place: Place) -> tuple[int, int]:
        offset = self.plan.offsets.get(place.buffer)
        if offset is None:
            return place.buffer, place.offset
        return len(self._buffers), offset + place.offset


def _release(indices: Sequence[int], tensors: _Tensors, bases: Any) -> None:
    for index in indices:
        tensors[index] = None


def _reader(view: View, buffer: Buffer) -> Callable[[_Tensors], Tensor]:
    """A function that returns the tensor of a view."""
    index, size, stride, offset = view
    if not offset and (size, stride) == (buffer.size, buffer.stride):
        return operator.itemgetter(index)

    def read(tensors: _Tensors) -> Tensor:
        whole: Tensor = tensors[index]
        return whole.as_strided(size, stride, whole.storage_offset() + offset)

    return read
