"""Branches: parallel linear maps of one map are one convolution, as RepVGG's are.

https://arxiv.org/abs/2101.03697
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ops.inference.layers import FastConv2d, FastLinear
from ops.inference.packed_linear import Quantization, multiplied_weight, quantization_of
from ops.rewriting.graph import NCHW, NHWC, Operator, OperatorGraph, Value, permuted
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


def merge_branches(graph: OperatorGraph, operator: Operator) -> None:
    """``conv(x) ± branch(x)``; a branch is a convolution, a batch norm, or the map itself."""
    sign = _SIGNS.get(operator.function)
    match operator.positional:
        case [Value() as left, Value() as right] if sign is not None:
            first, second = _branch(left), _branch(right)
        case _:
            return
    first, second = first or _itself(left, second), second or _itself(right, first)
    if first is None or second is None or not left.is_like(right):
        return
    sizes = {branch.groups for branch in (first, second)} - {None}
    same = first.x is second.x and first.stride == second.stride
    if not same or len(sizes) != 1 or len(first.weight) != len(second.weight):
        return
    (groups,) = sizes
    assert groups is not None
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


def _merged(branches: list[_Branch]) -> Quantization | None:
    """The precision of a convolution merged from several: int8 if all are in int8."""
    found = [b.quantization for b in branches if b.quantization is not None]
    if not found or len(found) < len(branches):
        return None
    return Quantization(found[0].in_range, origins=tuple(o for q in found for o in (q, *q.origins)))


def _branch(value: Value) -> _Branch | None:
    """The convolution that computes a value, if only one operator uses it."""
    match value:
        case Value(nn.BatchNorm2d() as norm, [x], once=True):
            scale, shift = affine_of(norm)
            return _Branch(x, scale.view(-1, 1, 1, 1), shift, (1, 1), None)
        case Value(FastConv2d(dilation=(1, 1), activation="none") as conv, [x], once=True):
            side = conv.kernel_size[0]
            if side % 2 and (conv.kernel_size, conv.padding) == ((side,) * 2, (side // 2,) * 2):
                stride: Any = conv.stride
                weights = conv.weight, conv.bias
                return _Branch(x, *weights, stride, conv.groups, quantization_of(conv))
    match permuted(value, NCHW):
        case Value(FastLinear(activation="none") as layer, [x], once=True) if value.once:
            if (pixels := permuted(x, NHWC)) is not None:
                weights = layer.weight[:, :, None, None], layer.bias
                return _Branch(pixels, *weights, (1, 1), 1, quantization_of(layer))
    return None


def _itself(x: Value, other: _Branch | None) -> _Branch | None:
    """A map that another branch reads."""
    if other is None or other.groups is None or other.x is not x:
        return None
    return _Branch(x, other.weight.new_ones(len(other.weight), 1, 1, 1), None, (1, 1), None)


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
