"""Feed-forwards: norm, linear, depthwise convolution and linear become one layer.

So do the first two with the means of channels, which is what an inverted bottleneck does before its
squeeze-and-excitation. https://arxiv.org/abs/1905.02244
"""

from __future__ import annotations

import itertools
from typing import Any, ClassVar, NamedTuple

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
from ops.rewriting.graph import NCHW, NHWC, Operator, OperatorGraph, Value
from ops.rewriting.lift import FastGlobalAvgPool2d

__all__ = ["Expansion", "FeedForward", "join_expansion", "join_feed_forward"]

_aten = torch.ops.aten
_permute = _aten.permute.default

# Bytes of the hidden map that fit into a core's L2 cache, and the minimum number of rows, below
# which re-reading the weights does not pay off.
_CHUNK_BYTES = 1 << 20
_CHUNK_ROWS = 384


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
        if self.conv is None:
            return self._in_pieces(x, residual)
        hidden = x if self.fc1 is None else self.fc1(x)
        return self.fc2(self.conv(hidden.permute(NCHW)).permute(NHWC), residual)

    def _in_pieces(self, x: Tensor, residual: Tensor | None) -> Tensor:
        """Both linear layers, in blocks of rows if the hidden map is large."""
        fc1: Any = self.fc1
        out = packed_pair(fc1.derived(x), self.fc2.derived(x), x, fc1.activation, residual)
        if out is not None:
            return out
        rows = x.numel() // max(1, x.shape[-1])
        chunk = max(_CHUNK_ROWS, _CHUNK_BYTES // (fc1.out_features * x.element_size()))
        if rows < 2 * chunk or x.requires_grad:
            return self.fc2(fc1(x), residual)
        shape = (*x.shape[:-1], self.fc2.out_features)
        x = x.reshape(rows, -1)
        shortcut = None if residual is None else residual.reshape(rows, -1)
        out = x.new_empty(rows, self.fc2.out_features)
        for start in range(0, rows, chunk):
            part = slice(start, start + chunk)
            out[part] = self.fc2(fc1(x[part]), None if shortcut is None else shortcut[part])
        return out.view(shape)

    def derive(self, x: Tensor) -> PackedDepthwiseMlp | None:
        fc1, conv = self.fc1, self.conv
        if is_quantized(fc1, self.fc2) and (
            conv is None or policy.depthwise_mlp_in_int8(x.shape[-1], x.dtype)
        ):
            return None
        activation = "none" if fc1 is None else fc1.activation
        last = "none" if conv is None else conv.activation
        return PackedDepthwiseMlp(fc1, conv, self.fc2, activation, last)


class _Step(NamedTuple):
    """A layer, its input, and the operators to remove once it is part of another layer."""

    layer: Any
    source: Value
    operators: list[Operator]


def join_feed_forward(graph: OperatorGraph, operator: Operator) -> bool:
    """``linear(conv(linear(norm(x))))``, where all but the last may be missing."""
    fc2 = operator.function
    if not isinstance(fc2, FastLinear) or fc2.activation != "none":
        return False
    if operator.kwargs.keys() - {"residual"}:
        return False
    conv = _convolution(graph, operator.args[0])
    first = graph.made_by(conv.source, FastLinear)
    if first is None or graph.only_user(conv.source) is None or first.kwargs:
        if conv.layer is None or not PackedDepthwiseMlp.applies(conv.layer, is_first=True):
            return False
        made = FeedForward(None, fc2, conv.layer)
        graph.replace(operator, made, conv.source, absorbed=conv.operators, **operator.kwargs)
        return True
    fc1: Any = first.function
    if conv.layer is None and fc1.activation == "none":
        return False
    norm = _norm(graph, first.args[0])
    made = FeedForward(fc1, fc2, conv.layer, norm.layer)
    absorbed = [*conv.operators, first, *norm.operators]
    path = _parent(first.path, operator.path)
    joined = graph.replace(operator, made, norm.source, absorbed=absorbed, **operator.kwargs)
    joined.path = path
    return True


def _parent(first: str, second: str) -> str:
    """The path of the module that two modules are in."""
    both = zip(first.split("."), second.split("."), strict=False)
    return ".".join(a for a, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], both))


def _convolution(graph: OperatorGraph, value: Value) -> _Step:
    """The depthwise convolution that computes a map, and its input, with channels last."""
    after = graph.made_by(value, _permute)
    conv = None if after is None else graph.made_by(after.args[0], FastDepthwiseConv2d)
    if after is None or conv is None or not PackedDepthwiseMlp.applies(conv.function):
        return _Step(None, value, [])
    if graph.only_user(value) is None or graph.only_user(conv.result) is None:
        return _Step(None, value, [])
    before = graph.permuted(conv.args[0], NCHW)
    if before is None:
        source = graph.insert_before(conv, _permute, conv.args[0], NHWC)
        return _Step(conv.function, source, [after, conv])
    used_once = graph.only_user(before.result) is not None
    return _Step(conv.function, before.args[0], [after, conv, *[before] * used_once])


def _norm(graph: OperatorGraph, value: Value) -> _Step:
    """The layer norm that computes a map, if only one operator uses it, and its input."""
    made = graph.made_by(value, FastLayerNorm)
    layer: Any = None if made is None else made.function
    if made is None or layer.activation != "none" or graph.only_user(value) is None:
        return _Step(None, value, [])
    return _Step(layer, made.args[0], [made])


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
