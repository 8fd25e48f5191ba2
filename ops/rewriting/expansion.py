"""Expansions: linear, depthwise convolution and the means of channels become one layer.

It is what an inverted bottleneck does before its squeeze-and-excitation, which needs the means of
the whole map. https://arxiv.org/abs/1905.02244
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from ops.cpu.feed_forward.depthwise_mlp import (
    PackedDepthwiseMlp,
    PackedExpansion,
    depthwise_expansion,
)
from ops.inference.conv import FastDepthwiseConv2d
from ops.inference.layers import FastLayer, FastLinear, is_quantized
from ops.rewriting.graph import NCHW, NHWC, Operator, OperatorGraph, Value
from ops.rewriting.lift import FastGlobalAvgPool2d

__all__ = ["Expansion", "join_expansion"]

_aten = torch.ops.aten


class Expansion(FastLayer):
    """``conv(fc1(x))``, each layer with its activation, and the means of its channels.

    (B, H, W, dim) → (B, H', W', hidden) and (B, hidden). In one pass by our kernel, or layer by
    layer.
    """

    kernels: ClassVar = (depthwise_expansion,)

    def __init__(self, fc1: FastLinear, conv: FastDepthwiseConv2d) -> None:
        super().__init__()
        self.fc1, self.conv = fc1, conv
        self.pool = FastGlobalAvgPool2d()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        packed = self.derived(x)
        if packed is not None:
            both: tuple[Tensor, Tensor] = packed(x)
            return both
        out = self.conv(self.fc1(x).permute(NCHW))
        return out.permute(NHWC), self.pool(out).flatten(1)

    def derive(self, x: Tensor) -> PackedExpansion:
        return PackedExpansion(self.fc1, self.conv, self.fc1.activation, self.conv.activation)


def join_expansion(graph: OperatorGraph, operator: Operator) -> bool:
    """``conv(permute(linear(x)))`` whose results are also pooled."""
    conv = operator.function
    if not isinstance(conv, FastDepthwiseConv2d):
        return False
    if not PackedDepthwiseMlp.applies(conv, is_first=True):
        return False
    map_ = operator.result
    pools = [user for user in map_.users if isinstance(user.function, FastGlobalAvgPool2d)]
    moved = graph.permuted(operator.args[0], NCHW)
    if moved is None or not pools:
        return False
    first = graph.made_by(moved.args[0], FastLinear)
    if first is None or first.kwargs or is_quantized(first.function):
        return False
    if graph.only_user(moved.args[0]) is None or graph.only_user(operator.args[0]) is None:
        return False
    batch, channels, height, width = map_.shape
    pixels = Value(torch.Size((batch, height, width, channels)), map_.dtype)
    means = Value(torch.Size((batch, channels)), map_.dtype)
    layer = Expansion(first.function, conv)
    made = graph.replace(operator, layer, *first.args, absorbed=[moved, first])
    made.results, made.returns_list = [pixels, means], True
    pixels.producer = means.producer = made
    after = graph.operators[graph.operators.index(made) + 1]
    graph.substitute(map_, graph.insert_before(after, _aten.permute.default, pixels, NCHW))
    for pool in pools:
        shape = list(pool.result.shape)
        pooled = graph.insert_before(after, _aten.reshape.default, means, shape)
        graph.substitute(pool.result, pooled)
        graph.remove(pool)
    return True
