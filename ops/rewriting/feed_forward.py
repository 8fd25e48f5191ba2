"""Feed-forwards: norm, linear, depthwise convolution and linear become one layer."""

from __future__ import annotations

import torch

from ops.cpu.feed_forward.depthwise_mlp import PackedDepthwiseMlp
from ops.inference.conv import FastDepthwiseConv2d
from ops.inference.layers import FastLinear
from ops.inference.norm import FastLayerNorm
from ops.rewriting.graph import Operator, OperatorGraph
from ops.rewriting.layers import FeedForward

__all__ = ["join_feed_forward"]

_permute = torch.ops.aten.permute.default


def join_feed_forward(graph: OperatorGraph, operator: Operator) -> bool:
    """``linear(conv(linear(norm(x))))``, where norm and convolution may be missing."""
    fc2 = operator.function
    if not isinstance(fc2, FastLinear) or fc2.activation != "none" or "scale" in operator.kwargs:
        return False
    hidden, conv, between = operator.args[0], None, []
    permuted = graph.made_by(hidden, _permute)
    if permuted is not None:
        conv = graph.made_by(permuted.args[0], FastDepthwiseConv2d)
        before = None if conv is None else graph.made_by(conv.args[0], _permute)
        if conv is None or before is None or not PackedDepthwiseMlp.takes(conv.function):
            return False
        between, hidden = [permuted, conv, before], before.args[0]
        if any(graph.only_user(o.result) is None for o in between):
            return False
    first = graph.made_by(hidden, FastLinear)
    if first is None or graph.only_user(hidden) is None or first.kwargs:
        return False
    if conv is None and first.function.activation == "none":
        return False
    norm = graph.made_by(first.args[0], FastLayerNorm)
    source = first.args[0]
    layer = None
    if norm is not None and graph.only_user(source) is first:
        layer = norm.function
        if layer.activation != "none":
            layer = None
    x = source if layer is None else norm.args[0]
    of_conv = None if conv is None else conv.function
    made = FeedForward(first.function, fc2, of_conv, layer)
    graph.replace(operator, made, x, **operator.kwargs)
    for other in (*between, first, *([] if layer is None else [norm])):
        graph.remove(other)
    return True
