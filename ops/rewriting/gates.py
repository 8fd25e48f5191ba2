"""Maps whose channels are gated and then added: residual blocks with channel attention.

See https://arxiv.org/abs/1709.01507 and https://arxiv.org/abs/1910.03151.
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
from ops.rewriting.graph import (
    NCHW,
    NHWC,
    Operator,
    OperatorGraph,
    Value,
    is_available,
    permuted,
)
from ops.rewriting.lift import FastAdaptiveAvgPool2d

__all__ = ["add_gated_linear", "join_channel_gates"]

_aten = torch.ops.aten
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


def join_channel_gates(graph: OperatorGraph, operator: Operator) -> None:
    """``x * sigmoid(conv1d(mean(x)))``, whatever views and casts are in between."""
    if operator.function is not _aten.mul.Tensor:
        return
    for x, gates in operator.in_both_orders:
        if not _gates_channels(x, gates):
            continue
        kinds = _aten.sigmoid.default, _aten.conv1d.default, FastAdaptiveAvgPool2d
        match _chain(gates, *kinds):
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


def _gates_channels(x: Any, gates: Any) -> bool:
    """Whether there is a gate for each channel of a map (B, C, H, W)."""
    if not isinstance(x, Value) or not isinstance(gates, Value) or len(x.shape) != 4:
        return False
    return gates.shape == (*x.shape[:2], 1, 1) and gates.dtype == x.dtype


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
    if operator.function is not _aten.add.Tensor or operator.kwargs:
        return
    for y, gated in operator.in_both_orders:
        match gated:
            case Value(_aten.mul.Tensor, [x, gates], once=True) if gated.is_like(y):
                pass
            case _:
                continue
        if not _gates_channels(x, gates) or not is_available(packed_linear, x.dtype):
            continue
        match permuted(x, NCHW), _chain(gates, depthwise_conv2d, FastAdaptiveAvgPool2d):
            case (
                Value(FastLinear(activation="none", quantization=None) as layer, [z], once=True),
                [_, pool],
            ) if pool.args[0] is x and {*x.users} == {pool, gated.producer}:
                return _put_gated_linear(graph, operator, layer, z, pool, gates, y)


def _put_gated_linear(
    graph: OperatorGraph,
    operator: Operator,
    layer: FastLinear,
    inputs: Value,
    pool: Operator,
    gates: Value,
    y: Value,
) -> None:
    x = pool.args[0]
    last, kind = operator, "none"
    follower = operator.result.user
    clip = None if follower is None else activation_kind(follower)
    if follower is not None and clip in ("relu", "relu6"):
        last, kind = follower, clip
    map_ = graph.insert_before(pool, _aten.permute.default, inputs, NCHW)
    means = graph.insert_before(pool, pool.function, map_, shape=(*map_.shape[:2], 1, 1))
    means = graph.insert_before(pool, _aten.flatten.using_ints, means, 1)
    means = graph.insert_before(pool, layer, means, shape=x.shape[:2])
    graph.replace(pool, _aten.reshape.default, means, list(pool.result.shape))
    flat = graph.insert_before(last, _aten.flatten.using_ints, gates, 1)
    residual = graph.insert_before(last, _aten.permute.default, y, NHWC)
    shape = [x.shape[axis] for axis in NHWC]
    joined = GatedLinear(layer, kind)
    value = graph.insert_before(last, joined, inputs, flat, residual, shape=shape)
    graph.replace(last, _aten.permute.default, value, NCHW, absorbed=operator)


def _chain(value: Any, *kinds: Any) -> list[Operator]:
    """The operators of these kinds that compute a value, each from the next one's; or none.

    What leaves values in their order may be in between. Kinds are operators of ATen, kernels or
    classes of layers.
    """
    found: list[Operator] = []
    for kind in kinds:
        while value.function in _SAME_VALUES and value.once:
            value = value.producer.args[0]
        if kind not in (value.function, type(value.function)):
            return []
        found.append(value.producer)
        value = value.producer.args[0]
    return found
