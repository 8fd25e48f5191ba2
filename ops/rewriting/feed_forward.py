"""Feed-forwards: norm, linear, depthwise convolution and linear become one layer.

So do the first two with the means of channels, which is what an inverted bottleneck does before its
squeeze-and-excitation. https://arxiv.org/abs/1905.02244
"""

from __future__ import annotations

import itertools
from typing import Any, ClassVar

import torch
from torch import Tensor

from ops.cpu import policy
from ops.cpu.feed_forward.depthwise_mlp import (
    PackedDepthwiseMlp,
    PackedExpansion,
    depthwise_expansion,
    depthwise_mlp,
)
from ops.inference.conv import FastDepthwiseConv2d
from ops.inference.layers import FastLayer, FastLinear, is_quantized
from ops.inference.norm import FastLayerNorm
from ops.inference.packed_linear import packed_pair
from ops.rewriting.graph import NCHW, NHWC, Operator, OperatorGraph, Value, permuted
from ops.rewriting.lift import FastAdaptiveAvgPool2d

__all__ = ["Expansion", "FeedForward", "join_expansion", "join_feed_forward"]

_aten = torch.ops.aten
_permute = _aten.permute.default


class FeedForward(FastLayer):
    """``fc2(conv(fc1(norm(x)))) + residual``, each layer with its activation.

    (B, ..., dim) → (B, ..., out_dim), or (B, H, W, dim) → (B, H', W', out_dim) with a depthwise
    ``conv`` of NCHW maps. In one pass by our kernel, or layer by layer.
    """

    kernels: ClassVar = (depthwise_mlp,)

    def __init__(
        self,
        fc1: FastLinear | None,
        fc2: FastLinear,
        conv: FastDepthwiseConv2d | None = None,
        norm: FastLayerNorm | None = None,
    ) -> None:
        super().__init__()
        self.fc1, self.fc2, self.conv, self.norm = fc1, fc2, conv, norm

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        packed = self.derived(x)
        if packed is not None and packed.pays(x):
            out: Tensor = packed(x, residual, self.norm)
            return out
        x = x if self.norm is None else self.norm(x)
        fc1: Any = self.fc1
        if self.conv is not None:
            hidden = x if fc1 is None else fc1(x)
            return self.fc2(self.conv(hidden.permute(NCHW)).permute(NHWC), residual)
        pair = packed_pair(fc1.derived(x), self.fc2.derived(x), x, fc1.activation, residual)
        return self.fc2(fc1(x), residual) if pair is None else pair

    def derive(self, x: Tensor) -> PackedDepthwiseMlp | None:
        fc1, conv = self.fc1, self.conv
        if is_quantized(fc1, self.fc2) and (
            conv is None or policy.depthwise_mlp_in_int8(x.shape[-1], x.dtype)
        ):
            return None
        activation = "none" if fc1 is None else fc1.activation
        last = "none" if conv is None else conv.activation
        return PackedDepthwiseMlp(fc1, conv, self.fc2, activation, last)


def join_feed_forward(graph: OperatorGraph, operator: Operator) -> None:
    """``linear(conv(linear(norm(x))))``, where all but the last may be missing."""
    fc2 = operator.function
    if not isinstance(fc2, FastLinear) or fc2.activation != "none":
        return
    if operator.kwargs.keys() - {"residual"}:
        return
    value, conv = operator.args[0], None
    match permuted(value, NHWC):
        case Value(FastDepthwiseConv2d() as layer, [map_], producer=made, once=True) if (
            value.once and PackedDepthwiseMlp.applies(layer)
        ):
            conv, value = layer, permuted(map_, NCHW)
    match value:
        case Value(FastLinear(activation=kind) as fc1, [x], producer=first, once=True) if (
            conv is not None or kind != "none"
        ):
            norm: Any = None
            match x:
                case Value(FastLayerNorm(activation="none") as norm, [source], once=True):
                    x = source
            joined = FeedForward(fc1, fc2, conv, norm)
            joint = graph.replace(operator, joined, x, absorbed=first, **operator.kwargs)
            joint.path = _parent(first.path, operator.path)
        case _ if conv is not None and PackedDepthwiseMlp.applies(conv, is_first=True):
            if value is None:
                value = graph.insert_before(made, _permute, map_, NHWC)
            joined = FeedForward(None, fc2, conv)
            graph.replace(operator, joined, value, absorbed=made, **operator.kwargs)


def _parent(first: str, second: str) -> str:
    """The path of the module that two modules are in."""
    both = zip(first.split("."), second.split("."), strict=False)
    return ".".join(a for a, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], both))


class Expansion(FastLayer):
    """``conv(fc1(x))``, each layer with its activation, and the means of its channels.

    (B, H, W, dim) → (B, H', W', hidden) and (B, hidden). In one pass by our kernel, or layer by
    layer.
    """

    kernels: ClassVar = (depthwise_expansion,)

    def __init__(self, fc1: FastLinear, conv: FastDepthwiseConv2d) -> None:
        super().__init__()
        self.fc1, self.conv = fc1, conv
        self.pool = FastAdaptiveAvgPool2d((1, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        packed = self.derived(x)
        if packed is not None:
            both: tuple[Tensor, Tensor] = packed(x)
            return both
        out = self.conv(self.fc1(x).permute(NCHW))
        return out.permute(NHWC), self.pool(out).flatten(1)

    def derive(self, x: Tensor) -> PackedExpansion:
        return PackedExpansion(self.fc1, self.conv, self.fc1.activation, self.conv.activation)


def _pools_all(layer: Any) -> bool:
    return isinstance(layer, FastAdaptiveAvgPool2d) and layer.output_size == (1, 1)


def join_expansion(graph: OperatorGraph, operator: Operator) -> None:
    """``conv(permute(linear(x)))`` whose results are also pooled."""
    match operator:
        case Operator(FastDepthwiseConv2d() as conv, [Value(once=True) as moved]):
            map_, first = operator.result, permuted(moved, NCHW)
        case _:
            return
    pools = [user for user in map_.users if _pools_all(user.function)]
    match first:
        case Value(FastLinear() as fc1, [x], once=True) if not is_quantized(fc1) and pools:
            pass
        case _:
            return
    if not PackedDepthwiseMlp.applies(conv, is_first=True):
        return
    batch, channels, height, width = map_.shape
    pixels = Value(torch.Size((batch, height, width, channels)), map_.dtype)
    means = Value(torch.Size((batch, channels)), map_.dtype)
    made = graph.replace(operator, Expansion(fc1, conv), x, absorbed=first.producer)
    made.results, made.returns_list = [pixels, means], True
    pixels.producer = means.producer = made
    after = graph.operators[graph.operators.index(made) + 1]
    graph.substitute(map_, graph.insert_before(after, _permute, pixels, NCHW))
    for pool in pools:
        shape = list(pool.result.shape)
        same = graph.insert_before(pool, _aten.reshape.default, means, shape)
        graph.substitute(pool.result, same)
