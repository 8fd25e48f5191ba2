"""Gates: halves of a linear layer that are multiplied, and maps that are gated and then added.

The former are SwiGLU and its relatives, https://arxiv.org/abs/2002.05202, the latter residual
blocks with channel attention, https://arxiv.org/abs/1709.01507 and
https://arxiv.org/abs/1910.03151.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ops.cpu.depthwise.conv import depthwise_conv2d
from ops.cpu.gemm.linear import packed_linear
from ops.inference.layers import FastLinear
from ops.rewriting.epilogues import activation_kind
from ops.rewriting.graph import NCHW, NHWC, Operator, OperatorGraph, Value, is_available
from ops.rewriting.lift import FastGlobalAvgPool2d, linear
from ops.rewriting.views import order_of

__all__ = ["add_gated", "add_gated_linear", "join_channel_gates", "split_gated_linear"]

_aten = torch.ops.aten
_SPLITS = (_aten.chunk.default, _aten.split.Tensor, _aten.split_with_sizes.default)
# What leaves values (B, C), with further axes of one, in their order.
_SAME_VALUES = (
    *(_aten.unsqueeze.default, _aten.select.int, _aten.flatten.using_ints, _aten.to.dtype),
    *(_aten.view.default, _aten.reshape.default, _aten.squeeze.dim),
)


class GatedLinear(nn.Module):
    """``activation(gates * linear(x) + residual)``: gates and shortcut are an epilogue.

    (B, ..., in_features), (B, out_features), (B, ..., out_features) → (B, ..., out_features).
    """

    def __init__(self, linear: FastLinear, activation: str) -> None:
        super().__init__()
        self.linear, self.activation = linear, activation

    def extra_repr(self) -> str:
        return f"activation={self.activation}"

    def forward(self, x: Tensor, gates: Tensor, residual: Tensor) -> Tensor:
        weight, _, bias, _ = self.linear.derived(x).packed()
        combined = self.activation, residual, "add_gated"
        out: Tensor = packed_linear(x, weight, bias, *combined, gate=gates)
        return out


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
        axis = halves.given["dim"]
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
        if not isinstance(y, Value) or not isinstance(value, Value):
            continue
        if y.shape != value.shape and (y.constant is None or y.shape[1:] != (value.shape[1], 1, 1)):
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


def join_channel_gates(graph: OperatorGraph, operator: Operator) -> bool:
    """``x * sigmoid(conv1d(mean(x)))``, whatever views and casts are in between."""
    if operator.function is not _aten.mul.Tensor:
        return False
    for x, gates in (operator.args[:2], operator.args[1::-1]):
        if not isinstance(x, Value) or not isinstance(gates, Value) or len(x.shape) != 4:
            continue
        sigmoid = _source(graph, gates, _aten.sigmoid.default)
        conv = sigmoid and _source(graph, sigmoid.args[0], _aten.conv1d.default)
        pool = conv and _source(graph, conv.args[0], FastGlobalAvgPool2d)
        if conv is None or pool is None or not _keeps_length(conv, x.shape):
            continue
        weight, means = conv.args[1].constant, pool.result
        of_channels = means.shape == gates.shape == (*x.shape[:2], 1, 1)
        if not of_channels or not x.dtype == gates.dtype == means.dtype or weight is None:
            continue
        if not is_available(depthwise_conv2d, x.dtype):
            continue
        # Channels are the columns of a map of one channel.
        taps, one = Value.of_constant(weight.view(1, -1, 1).float()), [1, 1]
        row = graph.insert_before(
            operator, _aten.reshape.default, means, [x.shape[0], 1, 1, x.shape[1]]
        )
        given = row, taps, None, one, [0, taps.shape[1] // 2], one, "sigmoid"
        made = graph.insert_before(operator, depthwise_conv2d, *given, shape=row.shape)
        made = graph.insert_before(operator, _aten.reshape.default, made, list(means.shape))
        graph.replace(operator, _aten.mul.Tensor, x, made)
        graph.remove_unused()
        return True
    return False


def _source(graph: OperatorGraph, value: Value, kind: Any) -> Operator | None:
    """The operator of a kind that computes a value, before views and casts of it alone."""
    made = value.producer
    while made is not None and made.function in _SAME_VALUES and graph.only_user(made.result):
        value = made.args[0]
        made = value.producer
    return graph.made_by(value, kind)


def _keeps_length(conv: Operator, shape: Sequence[int]) -> bool:
    """Whether a convolution of (B, 1, C) has one filter, of odd size, and as many results."""
    size, given = conv.args[1].shape, conv.given
    geometry = [given[name] for name in ("bias", "stride", "padding", "dilation", "groups")]
    return (
        tuple(conv.args[0].shape) == (shape[0], 1, shape[1])
        and tuple(size[:2]) == (1, 1)
        and size[2] % 2 == 1
        and geometry == [None, [1], [size[2] // 2], [1], 1]
    )


def add_gated_linear(graph: OperatorGraph, operator: Operator) -> bool:
    """``activation(y + x * gates)`` where a linear layer gives ``x``, and its means the gates.

    These means are the products of the means of the layer's inputs.
    """
    if operator.function is not _aten.addcmul.default or operator.kwargs:
        return False
    y, x, gates = operator.args
    moved, conv = graph.permuted(x, NCHW), _source(graph, gates, depthwise_conv2d)
    if moved is None or conv is None or graph.only_user(moved.args[0]) is not moved:
        return False
    made = graph.made_by(moved.args[0], FastLinear)
    pool = _source(graph, conv.args[0], FastGlobalAvgPool2d)
    if made is None or made.kwargs or pool is None or pool.args[0] is not x:
        return False
    layer: Any = made.function
    if layer.activation != "none" or layer.quantization is not None:
        return False
    if graph.is_output(x) or {*map(id, x.users)} != {id(pool), id(operator)}:
        return False
    if not is_available(packed_linear, x.dtype):
        return False
    last, kind, absorbed = operator, "none", list[Operator]()
    follower = graph.only_user(operator.result)
    clip = None if follower is None else activation_kind(follower)
    if follower is not None and clip in ("relu", "relu6"):
        last, kind, absorbed = follower, clip, [operator]
    map_ = graph.insert_before(pool, _aten.permute.default, made.args[0], NCHW)
    means = graph.insert_before(pool, pool.function, map_, shape=(*map_.shape[:2], 1, 1))
    means = graph.insert_before(pool, _aten.flatten.using_ints, means, 1)
    means = graph.insert_before(pool, layer, means, shape=x.shape[:2])
    graph.replace(pool, _aten.reshape.default, means, list(pool.result.shape))
    flat = graph.insert_before(last, _aten.flatten.using_ints, gates, 1)
    residual = graph.insert_before(last, _aten.permute.default, y, NHWC)
    shape = [x.shape[axis] for axis in NHWC]
    gated = GatedLinear(layer, kind)
    value = graph.insert_before(last, gated, made.args[0], flat, residual, shape=shape)
    graph.replace(last, _aten.permute.default, value, NCHW, absorbed=absorbed)
    graph.remove_unused()
    return True
