"""Feed-forwards: norm, linear, depthwise convolution and linear become one layer."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ops.cpu.feed_forward.depthwise_mlp import PackedDepthwiseMlp
from ops.inference.conv import FastDepthwiseConv2d
from ops.inference.layers import FastLinear
from ops.inference.norm import FastLayerNorm
from ops.rewriting.graph import Operator, OperatorGraph, Value
from ops.rewriting.layers import FeedForward

__all__ = ["join_feed_forward"]

_permute = torch.ops.aten.permute.default


class _Step(NamedTuple):
    """A layer, what it reads, and the operators that go once it is part of another."""

    layer: Any
    source: Value
    operators: list[Operator]


def join_feed_forward(graph: OperatorGraph, operator: Operator) -> bool:
    """``linear(conv(linear(norm(x))))``, where norm and convolution may be missing."""
    fc2 = operator.function
    if not isinstance(fc2, FastLinear) or fc2.activation != "none" or "scale" in operator.kwargs:
        return False
    conv = _convolution(graph, operator.args[0])
    first = graph.made_by(conv.source, FastLinear)
    if first is None or graph.only_user(conv.source) is None or first.kwargs:
        return False
    fc1: Any = first.function
    if conv.layer is None and fc1.activation == "none":
        return False
    norm = _norm(graph, first.args[0])
    made = FeedForward(fc1, fc2, conv.layer, norm.layer)
    absorbed = [*conv.operators, first, *norm.operators]
    graph.replace(operator, made, norm.source, absorbed=absorbed, **operator.kwargs)
    return True


def _convolution(graph: OperatorGraph, value: Value) -> _Step:
    """The depthwise convolution that gives a map, and the map it reads, with channels last."""
    after = graph.made_by(value, _permute)
    conv = None if after is None else graph.made_by(after.args[0], FastDepthwiseConv2d)
    before = None if conv is None else graph.made_by(conv.args[0], _permute)
    if after is None or conv is None or before is None:
        return _Step(None, value, [])
    chain = [after, conv, before]
    layer: Any = conv.function
    used_once = all(graph.only_user(operator.result) is not None for operator in chain)
    if not used_once or not PackedDepthwiseMlp.takes(layer):
        return _Step(None, value, [])
    return _Step(layer, before.args[0], chain)


def _norm(graph: OperatorGraph, value: Value) -> _Step:
    """The layer norm that gives a map to one operator only, and the map it reads."""
    made = graph.made_by(value, FastLayerNorm)
    layer: Any = None if made is None else made.function
    if made is None or layer.activation != "none" or graph.only_user(value) is None:
        return _Step(None, value, [])
    return _Step(layer, made.args[0], [made])
