"""Permutations: two in a row are one, and elementwise operators move in front of them.

So the operators after a linear layer follow it directly and can become its epilogue.
"""

from __future__ import annotations

from typing import Any

import torch

from ops.inference.layers import ActivatedLayer, FastLinear
from ops.inference.norm import FastLayerNorm
from ops.rewriting.epilogues import activation_kind
from ops.rewriting.graph import Operator, OperatorGraph, Value

__all__ = ["join_permutations", "sink_permutation"]

_aten = torch.ops.aten
_BINARY = (_aten.add.Tensor, _aten.mul.Tensor, _aten.sub.Tensor, _aten.div.Tensor)


def order_of(operator: Operator | None) -> list[int] | None:
    """The axes of a permutation in their new order; None for other operators."""
    if operator is None:
        return None
    if operator.function is _aten.permute.default:
        rank = len(operator.result.shape)
        return [axis % rank for axis in operator.args[1]]
    if operator.function is _aten.transpose.int:
        rank = len(operator.result.shape)
        order = list(range(rank))
        a, b = (axis % rank for axis in operator.args[1:3])
        order[a], order[b] = order[b], order[a]
        return order
    return None


def join_permutations(graph: OperatorGraph, operator: Operator) -> bool:
    """Merge two consecutive permutations, or remove them if they cancel."""
    order = order_of(operator)
    if order is None:
        return False
    first = operator.args[0].producer
    before = order_of(first)
    if before is None:
        if order == sorted(order):
            graph.bypass(operator, operator.args[0])
            return True
        return False
    assert first is not None
    graph.replace(operator, _aten.permute.default, first.args[0], [before[axis] for axis in order])
    if not first.result.users and not graph.is_output(first.result):
        graph.remove(first)
    return True


def sink_permutation(graph: OperatorGraph, operator: Operator) -> bool:
    """``f(permute(x), y)`` → ``permute(f(x, permute⁻¹(y)))`` after layers on the last axis."""
    unary = activation_kind(operator) is not None
    if not unary and operator.function not in _BINARY:
        return False
    for at in range(1 if unary else min(2, len(operator.args))):
        value = operator.args[at]
        moved = value.producer if isinstance(value, Value) else None
        order = order_of(moved)
        if order is None or moved is None or graph.only_user(value) is not operator:
            continue
        layer = moved.args[0].producer
        kinds = ActivatedLayer if unary else (FastLinear, FastLayerNorm)
        if layer is None or not isinstance(layer.function, kinds):
            continue
        if operator.result.shape != value.shape or graph.only_user(moved.args[0]) is not moved:
            continue
        inverse = sorted(range(len(order)), key=order.__getitem__)
        args = list(operator.args)
        args[at] = moved.args[0]
        if not unary and isinstance(args[1 - at], Value):
            args[1 - at] = _permuted(graph, operator, args[1 - at], inverse)
        inner = graph.insert_before(operator, operator.function, *args, shape=args[at].shape)
        inner.producer.kwargs.update(operator.kwargs)  # type: ignore[union-attr]
        graph.replace(operator, _aten.permute.default, inner, order)
        graph.remove(moved)
        return True
    return False


def _permuted(graph: OperatorGraph, before: Operator, value: Value, order: list[int]) -> Any:
    rank = len(order)
    if len(value.shape) < rank:
        shape = [1] * (rank - len(value.shape)) + list(value.shape)
        value = graph.insert_before(before, _aten.reshape.default, value, shape)
    return graph.insert_before(before, _aten.permute.default, value, order)
