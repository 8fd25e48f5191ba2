"""Branches: parallel linear maps of one map are one convolution, as RepVGG's are.

https://arxiv.org/abs/2101.03697
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ops.inference.layers import FastLinear
from ops.inference.packed_linear import Quantization, multiplied_weight, quantization_of
from ops.rewriting.graph import NCHW, NHWC, Operator, OperatorGraph, Value
from ops.rewriting.lift import affine_of, put_convolution

__all__ = ["merge_branches"]

_aten = torch.ops.aten
_SIGNS = {_aten.add.Tensor: 1, _aten.sub.Tensor: -1}


class _Branch(NamedTuple):
    """A convolution of ``x``, (B, C, H, W), whose padding keeps the size up to the stride.

    ``groups`` is None for maps of single channels, which any number of groups can compute, and
    which are exact in any dtype.
    """

    x: Value
    weight: Tensor  # (out, in / groups, k, k), or (out, 1, 1, 1)
    bias: Tensor | None
    stride: tuple[int, int]
    groups: int | None
    quantization: Quantization | None = None


def merge_branches(graph: OperatorGraph, operator: Operator) -> bool:
    """``conv(x) ± branch(x)``; a branch is a convolution, a batch norm, or the map itself."""
    sign = _SIGNS.get(operator.function)
    if sign is None or operator.kwargs or not all(isinstance(a, Value) for a in operator.args):
        return False
    left, right = operator.args
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    first, second = _branch(graph, left), _branch(graph, right)
    for one, value in ((first, right), (second, left)):
        if one is not None and one.groups is not None and value is one.x:
            ones = one.weight.new_ones(len(one.weight), 1, 1, 1)
            itself = _Branch(value, ones, None, (1, 1), None)
            first, second = (first, itself) if value is right else (itself, second)
    if first is None or second is None:
        return False
    groups = first.groups if first.groups is not None else second.groups
    if groups is None or first.x is not second.x or first.stride != second.stride:
        return False
    if {first.groups, second.groups} - {groups, None}:
        return False
    if len(first.weight) != len(second.weight):
        return False
    side = max(first.weight.shape[2], second.weight.shape[2])
    inner = first.x.shape[1] // groups
    weight = _taps(first, inner, side) + sign * _taps(second, inner, side)
    terms = [s * b.bias for s, b in ((1, first), (sign, second)) if b.bias is not None]
    bias = sum(terms[1:], terms[0]).to(left.dtype) if terms else None
    weight = weight.to(left.dtype)
    padding = (side // 2, side // 2)
    geometry = {"stride": first.stride, "padding": padding, "dilation": (1, 1), "groups": groups}
    quantization = _merged([b for b in (first, second) if b.groups is not None])
    put_convolution(graph, operator, first.x, weight, bias, geometry, quantization)
    graph.remove_unused()
    return True


def _merged(branches: list[_Branch]) -> Quantization | None:
    """The precision of a convolution merged from several: int8 if all are in int8."""
    found = [b.quantization for b in branches if b.quantization is not None]
    if not found or len(found) < len(branches):
        return None
    return Quantization(found[0].in_range, origins=tuple(o for q in found for o in (q, *q.origins)))


def _branch(graph: OperatorGraph, value: Value) -> _Branch | None:
    """The convolution that computes a value, if only one operator uses it."""
    made = graph.made_by(value, nn.BatchNorm2d, nn.Conv2d, _aten.permute.default)
    if made is None or graph.only_user(value) is None:
        return None
    layer: Any = made.function
    if isinstance(layer, nn.BatchNorm2d):
        scale, shift = affine_of(layer)
        return _Branch(made.args[0], scale.view(-1, 1, 1, 1), shift, (1, 1), None)
    if isinstance(layer, nn.Conv2d):
        side = layer.kernel_size[0]
        same = layer.kernel_size == (side, side) and layer.padding == (side // 2, side // 2)
        if not same or side % 2 == 0 or layer.dilation != (1, 1) or layer.activation != "none":
            return None
        stride: Any = layer.stride
        weights = layer.weight, layer.bias
        return _Branch(made.args[0], *weights, stride, layer.groups, quantization_of(layer))
    product = graph.made_by(made.args[0], FastLinear)
    pixels = None if product is None else graph.permuted(product.args[0], NHWC)
    if product is None or pixels is None or graph.only_user(product.result) is None:
        return None
    if graph.permuted(value, NCHW) is None:
        return None
    layer = product.function
    if product.kwargs or layer.activation != "none":
        return None
    weights = layer.weight[:, :, None, None], layer.bias
    return _Branch(pixels.args[0], *weights, (1, 1), 1, quantization_of(layer))


def _taps(branch: _Branch, inner: int, side: int) -> Tensor:
    """The weight with a window of ``side`` and ``inner`` inputs for each output."""
    weight = multiplied_weight(branch.weight.detach(), branch.quantization)
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    if branch.groups is None and inner > 1:
        channels = torch.arange(len(weight))
        whole = weight.new_zeros(len(weight), inner, 1, 1)
        whole[channels, channels % inner] = weight[:, 0]
        weight = whole
    margin = (side - weight.shape[2]) // 2
    return F.pad(weight, (margin, margin, margin, margin))
