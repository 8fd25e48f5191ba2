"""Branches: parallel convolutions of one map are one convolution, as RepVGG's are."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ops.inference.layers import FastLinear
from ops.reparam import norm_affine
from ops.rewriting.graph import Operator, OperatorGraph, Value
from ops.rewriting.layers import convolution

__all__ = ["merge_branches"]

_aten = torch.ops.aten


def merge_branches(graph: OperatorGraph, operator: Operator) -> bool:
    """``conv(x) ± branch(x)``, a convolution, a batch norm or, if depthwise, the map itself."""
    if operator.function not in (_aten.add.Tensor, _aten.sub.Tensor) or operator.kwargs:
        return False
    left, right = operator.args[:2]
    if not isinstance(left, Value) or not isinstance(right, Value) or left.shape != right.shape:
        return False
    signs = (1, 1 if operator.function is _aten.add.Tensor else -1)
    for base, other, sign in ((left, right, signs), (right, left, signs[::-1])):
        conv = graph.made_by(base, nn.Conv2d)
        if conv is None or not _is_plain(graph, conv):
            continue
        layer: Any = conv.function
        branch = _taps(graph, other, conv.args[0], layer)
        if branch is None:
            continue
        weight, bias = branch
        side = max(weight.shape[2], layer.kernel_size[0])
        both = sign[0] * _grown(layer.weight, side) + sign[1] * _grown(weight, side)
        terms = [s * b for s, b in zip(sign, (layer.bias, bias), strict=True) if b is not None]
        geometry = {
            "stride": layer.stride,
            "padding": (side // 2, side // 2),
            "dilation": (1, 1),
            "groups": layer.groups,
        }
        made = convolution(both.detach(), sum(terms) if terms else None, geometry)  # type: ignore[arg-type]
        graph.replace(operator, made, conv.args[0])
        graph.remove_unused()
        return True
    return False


def _is_plain(graph: OperatorGraph, operator: Operator) -> bool:
    """Whether this is a convolution of odd windows, padded to the map's size, used once."""
    layer: Any = operator.function
    side = layer.kernel_size[0]
    square = layer.kernel_size == (side, side) and layer.padding == (side // 2, side // 2)
    same = square and side % 2 == 1 and layer.dilation == (1, 1)
    return same and layer.activation == "none" and graph.only_user(operator.result) is not None


def _taps(
    graph: OperatorGraph, value: Value, x: Value, layer: Any
) -> tuple[Tensor, Tensor | None] | None:
    """A branch of ``x`` as weight and bias of a convolution like ``layer``; None if it is none."""
    inner = layer.in_channels // layer.groups
    if value is x:
        if inner != 1 or layer.stride != (1, 1):
            return None
        return layer.weight.new_ones(layer.out_channels, 1, 1, 1), None
    if graph.only_user(value) is None:
        return None
    norm = graph.made_by(value, nn.BatchNorm2d)
    if norm is not None and norm.args[0] is x and layer.stride == (1, 1):
        scale, shift = norm_affine(norm.function)  # type: ignore[arg-type]
        weight = layer.weight.new_zeros(layer.out_channels, inner, 1, 1)
        channels = torch.arange(layer.out_channels)
        weight[channels, channels % inner] = scale.view(-1, 1, 1)
        return weight, shift
    other = graph.made_by(value, nn.Conv2d)
    if other is not None and other.args[0] is x and _is_plain(graph, other):
        conv: Any = other.function
        if (conv.stride, conv.groups) == (layer.stride, layer.groups):
            return conv.weight, conv.bias
    permuted = graph.made_by(value, _aten.permute.default)
    linear = None if permuted is None else graph.made_by(permuted.args[0], FastLinear)
    if linear is None or layer.groups != 1 or layer.stride != (1, 1):
        return None
    pixels = graph.made_by(linear.args[0], _aten.permute.default)
    if pixels is None or pixels.args[0] is not x or list(pixels.args[1]) != [0, 2, 3, 1]:
        return None
    product: Any = linear.function
    if linear.kwargs or product.activation != "none":
        return None
    return product.weight[:, :, None, None], product.bias


def _grown(weight: Tensor, side: int) -> Tensor:
    margin = (side - weight.shape[2]) // 2
    return F.pad(weight, (margin, margin, margin, margin))
