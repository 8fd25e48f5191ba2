"""Gates: halves of a linear layer that are multiplied, and maps that are gated and then added.

The former are SwiGLU and its relatives, https://arxiv.org/abs/2002.05202, the latter residual
blocks with channel attention, https://arxiv.org/abs/1709.01507 and
https://arxiv.org/abs/1910.03151.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ops.cpu.depthwise.conv import depthwise_conv2d
from ops.cpu.gemm.linear import packed_linear
from ops.inference.layers import FastLinear
from ops.rewriting.epilogues import activation_kind, gates_channels
from ops.rewriting.graph import (
    NCHW,
    NHWC,
    Operator,
    OperatorGraph,
    Value,
    chain,
    is_available,
    permuted,
)
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


def split_gated_linear(graph: OperatorGraph, operator: Operator) -> None:
    """``activation(h[0]) * h[1]`` for the halves ``h`` of one linear layer's outputs."""
    if operator.function is not _aten.mul.Tensor:
        return
    for gate, other in operator.in_both_orders:
        match gate:
            case Value(producer=Operator(args=[Value(once=True) as half, *_]) as activated):
                kind, halves = activation_kind(activated), half.producer
            case _:
                continue
        if kind is None or halves is None or halves.function not in _SPLITS or not gate.once:
            continue
        if {*halves.results} != {half, other} or len(halves.results) != 2 or not other.once:
            continue
        if (halves.given["dim"] + 1) % len(half.shape) or half.shape != other.shape:
            continue  # not halves of the last axis
        match halves.args[0]:
            case Value(FastLinear(activation="none") as layer, [x], producer=product, once=True):
                pass
            case _:
                continue
        weights = layer.weight.chunk(2)
        biases = (None, None) if layer.bias is None else layer.bias.chunk(2)
        parts = [linear(w, b, layer.quantization) for w, b in zip(weights, biases, strict=True)]
        gates, up = parts if halves.results[0] is half else parts[::-1]
        gates.activation = kind
        value = graph.insert_before(operator, up, x, shape=other.shape)
        graph.replace(operator, gates, x, absorbed=[activated, halves, product], factor=value)
        return


def add_gated(graph: OperatorGraph, operator: Operator) -> None:
    """``y + number * permute(x * gates)`` with gates of channels, in one pass."""
    if operator.function is not _aten.add.Tensor or operator.kwargs:
        return
    for y, value in operator.in_both_orders:
        if not isinstance(y, Value) or not isinstance(value, Value) or y.dtype != value.dtype:
            continue
        if y.shape != value.shape and (y.constant is None or y.shape[1:] != (value.shape[1], 1, 1)):
            continue
        found = _gated(value)
        if found is None:
            continue
        x, gates, order, number = found
        if number != 1:
            gates = graph.insert_before(operator, _aten.mul.Tensor, gates, number)
        if order != [0, 1, 2, 3]:
            x, gates = (
                graph.insert_before(operator, _aten.permute.default, t, order) for t in (x, gates)
            )
        graph.replace(operator, _aten.addcmul.default, y, x, gates)
        return


def _gated(value: Value) -> tuple[Value, Value, list[int], float] | None:
    """A map (B, C, H, W), its gates (B, C, 1, 1), the order of axes, and a factor."""
    order, number = list(range(4)), 1.0
    while len(value.shape) == 4 and value.once:
        axes = order_of(value.producer)
        match value:
            case Value(_, [x, *_]) if axes is not None:
                order, value = [axes[axis] for axis in order], x
            case Value(_aten.mul.Tensor, [Value() as x, Value() as other]):
                for image, gates in ((x, other), (other, x)):
                    varies = image.constant is None and gates.constant is None
                    of_channels = gates.shape == (*image.shape[:2], 1, 1)
                    if varies and image.shape == value.shape and of_channels:
                        return image, gates, order, number
                return None
            case Value(_aten.mul.Tensor, [x, other]):
                value, number = x, number * other
            case _:
                return None
    return None


def join_channel_gates(graph: OperatorGraph, operator: Operator) -> None:
    """``x * sigmoid(conv1d(mean(x)))``, whatever views and casts are in between."""
    if operator.function is not _aten.mul.Tensor:
        return
    for x, gates in operator.in_both_orders:
        if not isinstance(x, Value) or len(x.shape) != 4 or not gates_channels(x, gates):
            continue
        kinds = _aten.sigmoid.default, _aten.conv1d.default, FastGlobalAvgPool2d
        match chain(gates, *kinds, skipped=_SAME_VALUES):
            case [_, conv, pool] if _keeps_length(conv, x.shape):
                weight, means = conv.args[1].constant, pool.result
            case _:
                continue
        if (
            not gates.is_like(means)
            or weight is None
            or not is_available(depthwise_conv2d, x.dtype)
        ):
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
        return


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


def add_gated_linear(graph: OperatorGraph, operator: Operator) -> None:
    """``activation(y + x * gates)`` where a linear layer gives ``x``, and its means the gates.

    These means are the products of the means of the layer's inputs.
    """
    match operator:
        case Operator(_aten.addcmul.default, [y, x, gates]):
            kinds = depthwise_conv2d, FastGlobalAvgPool2d
        case _:
            return
    match permuted(x, NCHW), chain(gates, *kinds, skipped=_SAME_VALUES):
        case (
            Value(FastLinear(activation="none", quantization=None) as layer, [inputs], once=True),
            [_, pool],
        ) if pool.args[0] is x and {*x.users} == {pool, operator}:
            pass
        case _:
            return
    if not is_available(packed_linear, x.dtype):
        return
    last, kind, absorbed = operator, "none", list[Operator]()
    follower = operator.result.user
    clip = None if follower is None else activation_kind(follower)
    if follower is not None and clip in ("relu", "relu6"):
        last, kind, absorbed = follower, clip, [operator]
    map_ = graph.insert_before(pool, _aten.permute.default, inputs, NCHW)
    means = graph.insert_before(pool, pool.function, map_, shape=(*map_.shape[:2], 1, 1))
    means = graph.insert_before(pool, _aten.flatten.using_ints, means, 1)
    means = graph.insert_before(pool, layer, means, shape=x.shape[:2])
    graph.replace(pool, _aten.reshape.default, means, list(pool.result.shape))
    flat = graph.insert_before(last, _aten.flatten.using_ints, gates, 1)
    residual = graph.insert_before(last, _aten.permute.default, y, NHWC)
    shape = [x.shape[axis] for axis in NHWC]
    gated = GatedLinear(layer, kind)
    value = graph.insert_before(last, gated, inputs, flat, residual, shape=shape)
    graph.replace(last, _aten.permute.default, value, NCHW, absorbed=absorbed)
