"""Lowering: replaces torch calls in a replay by a kernel that needs neither Python nor torch.

The kernel (``ops/cpu/replay/replay.cpp``) copies, adds, subtracts, multiplies, joins and selects
rows, bit-identical to torch. It is for tensors so small that the overhead of calling torch
dominates.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ops.cpu import policy
from ops.cpu.build import load
from ops.cpu.call.structures import structure
from ops.cpu.threads import VALUES, threads_for
from ops.replay.graph import Block, Buffer, KernelCall, Place, TorchCall, View, is_view

_COPY, _ADD, _MULTIPLY, _SUBTRACT, _ADD_PRODUCT = range(5)  # as in ops/cpu/replay/replay.cpp
_MOST_AXES = 6
_MOST_ELEMENTS = 1 << 19
_MOST_PARTS = 64  # of a tensor that is joined, whose addresses fit into the list's arguments
_COMBINED = ({torch.float32}, {torch.bfloat16})
_PROBLEM = structure("replay/replay.cpp", "pointwise::Problem")


class _Operand(NamedTuple):
    """The start of a tensor (a place or an address) and its layout."""

    begin: Place | int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


class _Step(NamedTuple):
    """A problem of the kernel, and where the result, three operands and the table begin."""

    problem: bytes
    begins: list[Place | int]


_Steps = list[_Step | None] | None  # None, also within, where there is no equivalent


def lowered(call: TorchCall, buffers: Sequence[Buffer]) -> KernelCall | None:
    """The equivalent kernel call, or None if there is none.

    The caller must keep the memory of the constants of ``call`` alive.
    """
    lower = _LOWER.get(call.function)
    if lower is None or call.kwargs or len(call.results) > 1:
        return None
    given = pytree.tree_leaves(call.args, is_leaf=is_view)
    operands = [_operand(a, buffers) for a in given if isinstance(a, Tensor | View)]
    if call.results:
        (index,) = call.results.values()
        made = buffers[index]
        out = _Operand(Place(index, 0), made.size, made.stride, made.dtype)
    else:  # in place
        out = operands[0]
    if math.prod(out.size) >= _MOST_ELEMENTS:
        return None
    steps = lower(call, out, operands)
    if steps is None or not all(steps):
        return None
    return _kernel_call([step for step in steps if step is not None])


def _operand(value: Tensor | View, buffers: Sequence[Buffer]) -> _Operand:
    if isinstance(value, Tensor):
        return _Operand(value.data_ptr(), tuple(value.shape), value.stride(), value.dtype)
    dtype = buffers[value.buffer].dtype
    begin = Place(value.buffer, value.offset * dtype.itemsize)
    return _Operand(begin, value.size, value.stride, dtype)


def _copy(call: TorchCall, out: _Operand, operands: Sequence[_Operand]) -> _Steps:
    (source,) = operands
    if source.dtype != out.dtype:
        return None
    # A copy that changes the shape fills its result in row-major order.
    strides = out.stride if out.size == source.size else _dense(source.size)
    if out.size != source.size and out.stride != _dense(out.size):
        return None
    return [_step(_COPY, out._replace(size=source.size, stride=strides), [source])]


def _combine(
    operation: int, call: TorchCall, out: _Operand, operands: Sequence[_Operand]
) -> _Steps:
    dtypes = {o.dtype for o in (out, *operands)}
    if len(call.args) != 2 or len(operands) != 2 or dtypes not in _COMBINED:
        return None
    return [_step(operation, out, operands)]


def _add_product(call: TorchCall, out: _Operand, operands: Sequence[_Operand]) -> _Steps:
    dtypes = {o.dtype for o in (out, *operands)}
    if len(operands) != 3 or dtypes not in _COMBINED:
        return None
    if out.dtype == torch.float32 and not policy.rounds_once():
        return None
    third, first, second = operands
    return [_step(_ADD_PRODUCT, out, [first, second, third])]


def _join(call: TorchCall, out: _Operand, operands: Sequence[_Operand]) -> _Steps:
    axis = call.args[1] if len(call.args) > 1 else 0
    fits = all(o.dtype == out.dtype and len(o.size) == len(out.size) for o in operands)
    if not fits or len(operands) > _MOST_PARTS:
        return None
    steps, first = [], 0
    for part in operands:
        if 0 in part.size:
            continue
        place = first * out.stride[axis] * out.dtype.itemsize
        begin = _after(out.begin, place)
        steps.append(_step(_COPY, out._replace(begin=begin, size=part.size), [part]))
        first += part.size[axis]
    return steps


def _after(begin: Place | int, nbytes: int) -> Place | int:
    if isinstance(begin, Place):
        return begin._replace(offset=begin.offset + nbytes)
    return begin + nbytes


def _select(call: TorchCall, out: _Operand, operands: Sequence[_Operand]) -> _Steps:
    source, index = operands
    if not isinstance(index.begin, int) or index.stride != (1,) or index.dtype != torch.int64:
        return None
    axis = call.args[1] % len(source.size)
    return [_step(_COPY, out, [source._replace(size=out.size)], axis, index.begin)]


_Lower = Callable[[TorchCall, _Operand, Sequence[_Operand]], _Steps]
_aten = torch.ops.aten
_LOWER: dict[Any, _Lower] = {
    **dict.fromkeys((_aten.clone.default, _aten.contiguous.default), _copy),
    **dict.fromkeys((_aten.flatten.using_ints, _aten.reshape.default), _copy),
    **dict.fromkeys((_aten.add.Tensor, _aten.add_.Tensor), partial(_combine, _ADD)),
    **dict.fromkeys((_aten.mul.Tensor, _aten.mul_.Tensor), partial(_combine, _MULTIPLY)),
    _aten.sub.Tensor: partial(_combine, _SUBTRACT),
    _aten.addcmul.default: _add_product,
    _aten.cat.default: _join,
    _aten.index_select.default: _select,
}

_Axis = tuple[int, ...]  # size; strides of the result and of three operands


def _step(
    operation: int,
    out: _Operand,
    operands: Sequence[_Operand],
    table_axis: int = -1,
    table: int = 0,
) -> _Step | None:
    missing = 3 - len(operands)
    strides = [_broadcast(o, out.size) for o in operands] + [(0,) * len(out.size)] * missing
    axes: list[_Axis] = list(zip(out.size, out.stride, *strides, strict=True))
    of_table = axes[table_axis] if table else None
    axes = _merged([axis for axis in axes if axis[0] > 1 or axis is of_table], of_table)
    if len(axes) > _MOST_AXES or axes[-1] is of_table:
        return None
    if axes[-1][1] != 1 or not {*axes[-1][2:]} <= {0, 1}:
        return None
    padded = [*axes, *[(0,) * 5] * (_MOST_AXES - len(axes))]
    where = next((i for i, axis in enumerate(axes) if axis is of_table), -1)
    sizes, *of_tensors = zip(*padded, strict=True)
    names = ("out_strides", "first_strides", "second_strides", "third_strides")
    problem = _PROBLEM(
        operation=operation,
        element_bytes=out.dtype.itemsize,
        axes=len(axes),
        table_axis=where,
        threads=threads_for(math.prod(out.size), VALUES),
        sizes=sizes,
        **dict(zip(names, of_tensors, strict=True)),
    )
    return _Step(bytes(problem), [out.begin, *(o.begin for o in operands), *[0] * missing, table])


def _kernel_call(steps: Sequence[_Step]) -> KernelCall:
    begins = [begin for step in steps for begin in step.begins]
    words = (ctypes.c_int64 * len(begins))(*(0 if isinstance(b, Place) else b for b in begins))
    places = tuple((8 * i, b) for i, b in enumerate(begins) if isinstance(b, Place))
    library = load("replay")
    assert library is not None  # Replay requires it
    function = ctypes.cast(library.replay_pointwise, ctypes.c_void_p).value
    assert function is not None
    problems = Block(b"".join(step.problem for step in steps), ())
    return KernelCall(function, [problems, Block(bytes(words), places), len(steps)])


def _merged(axes: list[_Axis], of_table: _Axis | None) -> list[_Axis]:
    """Merge adjacent axes where possible and sort them by descending stride in the result."""
    merged: list[_Axis] = []
    for axis in sorted(axes, key=lambda axis: -axis[1]):
        before = merged[-1] if merged else None
        size = axis[0]
        if (
            before is not None
            and before is not of_table
            and axis is not of_table
            and all(b == a * size for b, a in zip(before[1:], axis[1:], strict=True))
        ):
            merged[-1] = (before[0] * size, *axis[1:])
        else:
            merged.append(axis)
    return merged or [(1, 1, 1, 0, 0)]


def _dense(size: Sequence[int]) -> tuple[int, ...]:
    return torch.empty(size, device="meta").stride()


def _broadcast(operand: _Operand, size: Sequence[int]) -> tuple[int, ...]:
    """The strides of an operand broadcast to ``size``."""
    whole = torch.empty_strided(operand.size, operand.stride, device="meta")
    return whole.expand(size).stride()
