"""Softmax: a table that is added before and a conversion after it take no passes.

Mixes of neighborhoods compute their weights on the way, as those of OverLoCK's dynamic kernels,
https://arxiv.org/abs/2502.20087.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ops.cpu import policy
from ops.cpu.neighborhood import attention
from ops.cpu.norm import softmax
from ops.inference.layers import FastLinear
from ops.rewriting.graph import Operator, OperatorGraph, Value, is_available, permuted
from ops.rewriting.lift import constant_of

__all__ = ["join_mixes", "join_softmax"]

_aten = torch.ops.aten


def join_softmax(graph: OperatorGraph, operator: Operator) -> None:
    """``softmax(x + table)`` in float32 over the last axis, also converted to bfloat16."""
    match operator:
        case Operator(_aten.softmax.int, [Value(_aten.add.Tensor, [x, table]) as total, axis]):
            last, bias = operator, constant_of(table)
        case _:
            return
    if bias is None or x.constant is not None or x.dtype != torch.float32:
        return
    if axis not in (-1, len(x.shape) - 1) or not total.is_like(x) or not total.once:
        return
    if bias.shape != x.shape[1:] or bias.dtype not in (torch.float32, torch.bfloat16):
        return
    if not is_available(softmax.biased_softmax, x.dtype):
        return
    match operator.result.user:
        case Operator(_aten.to.dtype, [_, torch.float32 | torch.bfloat16]) as after:
            last = after
    dense, half = Value.of_constant(bias.contiguous()), last.result.dtype == torch.bfloat16
    graph.replace(last, softmax.biased_softmax, x, dense, half, absorbed=operator)


class _Mix(NamedTuple):
    """Of ``values`` in windows of ``side``², by ``softmax(part + bias)``."""

    part: Value
    bias: Value
    values: Value
    side: int


def join_mixes(graph: OperatorGraph, operator: Operator) -> None:
    """Mixes by ``softmax(part of (query @ linear(key)) + table)``, concatenated by heads."""
    layer: FastLinear
    columns: Value
    key: Value
    match operator:
        case Operator(_aten.cat.default, [parts, 3]):
            mixes = [mix for part in parts if (mix := _mix(part)) is not None]
        case _:
            return
    if not mixes or len(mixes) < len(parts):
        return
    made = mixes[0].part.producer
    match made:
        case Operator(_aten.split_with_sizes.default, [product, sizes, -1 | 3]):
            pass
        case _:
            return
    match product:
        case Value(
            _aten.matmul.default,
            [
                Value(_aten.transpose.int, [columns, -2, -1]),
                Value(FastLinear(bias=None, activation="none") as layer, [inputs]) as key,
            ],
            dtype=torch.float32,
        ) if columns.shape[:2] == key.shape[:2] and made.results == [mix.part for mix in mixes]:
            columns, key = _in_half(columns), _in_half(inputs)
        case _:
            return
    kernel = attention.na_cpu_dynamic_mix
    dtypes = {columns.dtype, key.dtype, *(mix.values.dtype for mix in mixes)}
    if len({mix.values.shape for mix in mixes}) > 1 or len(dtypes) > 1:
        return
    if policy.left_to_torch("gemm", product.dtype) or not is_available(kernel, *dtypes):
        return
    query = graph.insert_before(operator, _aten.transpose.int, columns, -2, -1)
    weights = layer.weight.detach().float().T.split(sizes, dim=1)
    maps = [Value.of_constant(weight.contiguous()) for weight in weights]
    _, biases, values, sides = (list(of_each) for of_each in zip(*mixes, strict=True))
    graph.replace(operator, kernel, query, key, maps, biases, values, sides)


def _mix(value: Value) -> _Mix | None:
    """The mix that gives (B, H, W, heads, dim)."""
    match permuted(value, [0, 2, 3, 1, 4]):
        case Value(
            attention.na_cpu_mix, [weights, values, [side, columns], [1, 1], [False, False]]
        ) if side == columns:
            pass
        case _:
            return None
    match weights:
        case Value(softmax.biased_softmax, [Value(_aten.unflatten.int, [part, 2, _]), bias, _]):
            return _Mix(part, bias, values, side)
    return None


def _in_half(value: Value) -> Value:
    """The same in bfloat16 if it was converted from that."""
    match value:
        case Value(_aten.to.dtype, [Value(dtype=torch.bfloat16) as half, torch.float32]):
            return half
    return value
