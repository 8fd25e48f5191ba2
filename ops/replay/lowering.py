"""Lowering: replaces torch calls in a replay by a kernel that needs neither Python nor torch.

The kernel (``ops/cpu/replay/replay.cpp``) copies, adds, subtracts, multiplies, joins and selects
rows, bit-identical to torch. It is for tensors so small that the overhead of calling torch
dominates.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ops.cpu import policy
from ops.cpu.build import load
from ops.cpu.call.structures import structure
from ops.cpu.threads import VALUES, threads_for
from ops.fuse.nested import leaves
from ops.replay.graph import Block, Buffer, KernelCall, Place, TorchCall, View

_COPY, _ADD, _MULTIPLY, _SUBTRACT, _ADD_PRODUCT = range(5)  # as in ops/cpu/replay/replay.cpp
_MOST_AXES = 6
_MOST_ELEMENTS = 1 << 19
_MOST_PARTS = 64  # of a tensor that is joined, whose addresses fit into the list's arguments
_COMBINED = ({torch.float32}, {torch.bfloat16})
_PROBLEM = structure("replay/replay.cpp", "pointwise::Problem")


class _Operand(NamedTuple):
    """The start of a tensor (a place or an address) and a meta tensor of its layout."""

    begin: Place | int
    layout: Tensor


class _Step(NamedTuple):
    """A problem of the kernel, and where the result, three operands and the table begin."""

    problem: bytes
    begins: list[Place | int]


class _NoEquivalentError(Exception):
    """The kernel does not compute this."""


def lowered(call: TorchCall, buffers: Sequence[Buffer]) -> KernelCall | None:
    """The equivalent kernel call, or None if there is none.

    The caller must keep the memory of the constants of ``call`` alive.
    """
    lower = _LOWER.get(call.function)
    if lower is None or call.kwargs or len(call.results) > 1:
        return None
    given = [leaf for leaf in leaves(call.args) if isinstance(leaf, Tensor | View)]
    operands = [_operand(a, buffers) for a in given]
    out = operands[0]  # in place
    for index in call.results.values():
        out = _operand(View(index, buffers[index].size, buffers[index].stride, 0), buffers)
    if out.layout.numel() >= _MOST_ELEMENTS:
        return None
    try:
        return _kernel_call(lower(call, out, operands))
    except _NoEquivalentError:
        return None


def _operand(value: Tensor | View, buffers: Sequence[Buffer]) -> _Operand:
    if isinstance(value, Tensor):
        return _Operand(value.data_ptr(), _layout(value.shape, value.stride(), value.dtype))
    dtype = buffers[value.buffer].dtype
    begin = Place(value.buffer, value.offset * dtype.itemsize)
    return _Operand(begin, _layout(value.size, value.stride, dtype))


def _layout(size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(size, stride, dtype=dtype, device="meta")


def _require(*conditions: bool) -> None:
    if not all(conditions):
        raise _NoEquivalentError


def _copy(call: TorchCall, out: _Operand, operands: Sequence[_Operand]) -> list[_Step]:
    ((_, source),) = operands
    layout = out.layout
    _require(source.dtype == layout.dtype)
    if layout.shape != source.shape:  # fills its result in row-major order
        _require(layout.is_contiguous())
        layout = layout.view(source.shape)
    return [_step(_COPY, out._replace(layout=layout), operands)]


def _combine(
    operation: int, call: TorchCall, out: _Operand, operands: Sequence[_Operand]
) -> list[_Step]:
    dtypes = {o.layout.dtype for o in (out, *operands)}
    _require(len(call.args) == len(operands) == 2, dtypes in _COMBINED)
    return [_step(operation, out, operands)]


def _add_product(call: TorchCall, out: _Operand, operands: Sequence[_Operand]) -> list[_Step]:
    dtypes = {o.layout.dtype for o in (out, *operands)}
    _require(len(operands) == 3, dtypes in _COMBINED)
    _require(dtypes == {torch.bfloat16} or policy.rounds_once())
    third, first, second = operands
    return [_step(_ADD_PRODUCT, out, [first, second, third])]


def _join(call: TorchCall, out: _Operand, operands: Sequence[_Operand]) -> list[_Step]:
    axis = call.args[1] if len(call.args) > 1 else 0
    whole = out.layout
    fits = (o.layout.dtype == whole.dtype and o.layout.ndim == whole.ndim for o in operands)
    _require(len(operands) <= _MOST_PARTS, *fits)
    steps, first = [], 0
    for part in operands:
        if part.layout.numel():
            layout = whole.narrow(axis, first, part.layout.shape[axis])
            begin = _after(out.begin, int(layout.storage_offset()) * layout.itemsize)
            steps.append(_step(_COPY, _Operand(begin, layout), [part]))
            first += layout.shape[axis]
    return steps


def _after(begin: Place | int, nbytes: int) -> Place | int:
    if isinstance(begin, Place):
        return begin._replace(offset=begin.offset + nbytes)
    return begin + nbytes


def _select(call: TorchCall, out: _Operand, operands: Sequence[_Operand]) -> list[_Step]:
    (begin, source), (table, index) = operands
    _require(isinstance(table, int), index.stride() == (1,), index.dtype == torch.int64)
    rows = _Operand(begin, _layout(out.layout.shape, source.stride(), source.dtype))
    return [_step(_COPY, out, [rows], call.args[1] % source.ndim, table)]


_aten = torch.ops.aten
_LOWER: dict[Any, Callable[[TorchCall, _Operand, Sequence[_Operand]], list[_Step]]] = {
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
    table: Any = 0,
) -> _Step:
    missing = 3 - len(operands)
    size, stride = out.layout.shape, out.layout.stride()
    strides = [o.layout.expand(size).stride() for o in operands] + [(0,) * len(size)] * missing
    axes: list[_Axis] = list(zip(size, stride, *strides, strict=True))
    of_table = axes[table_axis] if table else None
    axes = _merged([axis for axis in axes if axis[0] > 1 or axis is of_table], of_table)
    _require(len(axes) <= _MOST_AXES, axes[-1] is not of_table)
    _require(axes[-1][1] == 1, {*axes[-1][2:]} <= {0, 1})
    padded = [*axes, *[(0,) * 5] * (_MOST_AXES - len(axes))]
    where = next((i for i, axis in enumerate(axes) if axis is of_table), -1)
    sizes, *of_tensors = zip(*padded, strict=True)
    names = ("out_strides", "first_strides", "second_strides", "third_strides")
    problem = _PROBLEM(
        operation=operation,
        element_bytes=out.layout.itemsize,
        axes=len(axes),
        table_axis=where,
        threads=threads_for(out.layout.numel(), VALUES),
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
