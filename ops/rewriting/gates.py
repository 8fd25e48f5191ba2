"""Gates: halves of a linear layer that are multiplied, and maps that are gated and then added.

The former are SwiGLU and its relatives, https://arxiv.org/abs/2002.05202, the latter residual
blocks with channel attention, https://arxiv.org/abs/1709.01507.
"""

from __future__ import annotations

from typing import Any

import torch

from ops.inference.layers import FastLinear
from ops.rewriting.epilogues import activation_kind
from ops.rewriting.graph import Operator, OperatorGraph, Value
from ops.rewriting.layers import linear
from ops.rewriting.views import order_of

__all__ = ["add_gated", "split_gated_linear"]

_aten = torch.ops.aten
_SPLITS = (_aten.chunk.default, _aten.split.Tensor, _aten.split_with_sizes.default)


def split_gated_linear(graph: OperatorGraph, operator: Operator) -> bool:
    """``activation(h[0]) * h[1]`` for the halves ``h`` of one linear layer's outputs."""
    if operator.function is not _aten.mul.Tensor:
        return False
    for gate, other in (operator.args[:2], operator.args[1::-1]):
        activated = gate.producer if isinstance(gate, Value) else None
        kind = None if activated is None else activation_kind(activated)
        if activated is None or kind is None or graph.only_user(gate) is not operator:
            continue
        half = activated.args[0]
        halves = graph.made_by(half, *_SPLITS)
        if halves is None or {*halves.results} != {half, other} or len(halves.results) != 2:
            continue
        whole, last = halves.args[0], len(half.shape) - 1
        axis = halves.args[2] if len(halves.args) > 2 else halves.kwargs.get("dim", 0)
        product = graph.made_by(whole, FastLinear)
        if axis % len(half.shape) != last or half.shape != other.shape or product is None:
            continue
        layer: Any = product.function
        used_once = all(graph.only_user(value) is not None for value in (whole, half, other))
        if not used_once or product.kwargs or layer.activation != "none":
            continue
        weights = layer.weight.chunk(2)
        biases = (None, None) if layer.bias is None else layer.bias.chunk(2)
        first, second = (
            linear(w, b, layer.quantization) for w, b in zip(weights, biases, strict=True)
        )
        gates, up = (first, second) if halves.results[0] is half else (second, first)
        gates.activation = kind
        x = product.args[0]
        value = graph.insert_before(operator, up, x, shape=other.shape)
        graph.replace(operator, gates, x, absorbed=[activated, halves, product], factor=value)
        return True
    return False


def add_gated(graph: OperatorGraph, operator: Operator) -> bool:
    """``y + number * permute(x * gates)`` with gates of channels, in one pass."""
    if operator.function is not _aten.add.Tensor or operator.kwargs:
        return False
    for y, value in (operator.args[:2], operator.args[1::-1]):
        if not isinstance(y, Value) or not isinstance(value, Value) or y.shape != value.shape:
            continue
        found = _gated(graph, value)
        if found is None or y.dtype != value.dtype:
            continue
        x, gates, order, number = found
        if number != 1:
            gates = graph.insert_before(operator, _aten.mul.Tensor, gates, number)
        if order != [0, 1, 2, 3]:
            x, gates = (
                graph.insert_before(operator, _aten.permute.default, t, order) for t in (x, gates)
            )
        graph.replace(operator, _aten.addcmul.default, y, x, gates)
        graph.remove_unused()
        return True
    return False


def _gated(graph: OperatorGraph, value: Value) -> tuple[Value, Value, list[int], float] | None:
    """A map (B, C, H, W), its gates (B, C, 1, 1), the order of axes, and a factor."""
    order, number = list(range(4)), 1.0
    while len(value.shape) == 4 and graph.only_user(value) is not None:
        made = value.producer
        axes = order_of(made)
        if made is None:
            return None
        if axes is not None:
            order = [axes[axis] for axis in order]
            value = made.args[0]
            continue
        if made.function is not _aten.mul.Tensor:
            return None
        x, other = made.args
        if not isinstance(other, Value):
            value, number = x, number * other
            continue
        for image, gates in ((x, other), (other, x)):
            varies = image.constant is None and gates.constant is None
            if varies and image.shape == value.shape and gates.shape == (*image.shape[:2], 1, 1):
                return image, gates, order, number
        return None
    return None
