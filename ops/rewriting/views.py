"""Permutations: two in a row are one, and elementwise operators move in front of them.

So the operators after a linear layer follow it directly and can become its epilogue, and those of a
map see that its channels are last.
"""

from __future__ import annotations

from typing import Any

import torch

from ops.inference.layers import ActivatedLayer, FastLinear
from ops.inference.norm import FastLayerNorm
from ops.rewriting.epilogues import activation_kind
from ops.rewriting.graph import NCHW, Operator, OperatorGraph, Value

__all__ = ["join_permutations", "sink_permutation", "unfold_map"]

_aten = torch.ops.aten
_RESHAPES = (_aten.reshape.default, _aten.unflatten.int)
_PERMUTATIONS = (_aten.permute.default, _aten.transpose.int)
_BINARY = (_aten.add.Tensor, _aten.mul.Tensor, _aten.sub.Tensor, _aten.div.Tensor)


def _order_of(operator: Operator | None) -> list[int] | None:
    """The axes of a permutation in their new order; None for other operators."""
    if operator is None or operator.function not in _PERMUTATIONS:
        return None
    numbered = torch.empty(*range(len(operator.result.shape)), device="meta")
    return list(operator.function(numbered, *operator.args[1:]).shape)


def join_permutations(graph: OperatorGraph, operator: Operator) -> None:
    """Merge two consecutive permutations, or remove them if they cancel."""
    order = _order_of(operator)
    if order is None:
        return
    x = operator.args[0]
    before = _order_of(x.producer)
    if before is not None:
        axes = [before[axis] for axis in order]
        graph.replace(operator, _aten.permute.default, x.producer.args[0], axes)
    elif order == sorted(order):
        graph.substitute(operator.result, x)


def unfold_map(graph: OperatorGraph, operator: Operator) -> None:
    """``reshape(tokens.mT, (B, C, H, W))`` → ``permute(reshape(tokens, (B, H, W, C)))``.

    The former has strides of which torch doesn't see, for a single image, that channels are last.
    """
    if operator.function not in _RESHAPES:
        return
    x, shape = operator.args[0], operator.result.shape
    is_map = len(shape) == 4 and shape[:2] == x.shape[:2] and len(x.shape) == 3
    if is_map and _order_of(x.producer) == [0, 2, 1]:
        batch, channels, height, width = shape
        tokens, whole = x.producer.args[0], [batch, height, width, channels]
        nhwc = graph.insert_before(operator, _aten.reshape.default, tokens, whole)
        graph.replace(operator, _aten.permute.default, nhwc, NCHW)


def sink_permutation(graph: OperatorGraph, operator: Operator) -> None:
    """``f(permute(x), y)`` → ``permute(f(x, permute⁻¹(y)))`` after layers on the last axis."""
    unary = activation_kind(operator) is not None
    if not unary and operator.function not in _BINARY:
        return
    kinds = (ActivatedLayer,) if unary else (FastLinear, FastLayerNorm)
    for at, value in enumerate(operator.args[: 1 if unary else 2]):
        order = _order_of(value.producer) if isinstance(value, Value) else None
        if order is None or not value.once or operator.result.shape != value.shape:
            continue
        inner = value.producer.args[0]
        if not isinstance(inner.function, kinds) or not inner.once:
            continue
        inverse = sorted(range(len(order)), key=order.__getitem__)
        args = list(operator.args)
        args[at] = inner
        if not unary and isinstance(args[1 - at], Value):
            args[1 - at] = _permuted(graph, operator, args[1 - at], inverse)
        made = graph.insert_before(operator, operator.function, *args, shape=inner.shape)
        made.producer.kwargs.update(operator.kwargs)
        graph.replace(operator, _aten.permute.default, made, order)
        return


def _permuted(graph: OperatorGraph, before: Operator, value: Value, order: list[int]) -> Any:
    rank = len(order)
    if len(value.shape) < rank:
        shape = [1] * (rank - len(value.shape)) + list(value.shape)
        value = graph.insert_before(before, _aten.reshape.default, value, shape)
    return graph.insert_before(before, _aten.permute.default, value, order)
