"""Shortcuts: a linear layer adds another map, or a multiple of it, to its results."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ops.inference.layers import FastLinear
from ops.rewriting.epilogues import per_channel, product_of
from ops.rewriting.graph import NHWC, Operator, OperatorGraph, Value
from ops.rewriting.lift import linear
from ops.rewriting.views import order_of

__all__ = ["add_shortcut", "scale_shortcut"]

_aten = torch.ops.aten


class _Multiple(NamedTuple):
    """A map as ``root.permute(order) * scale``, with a scale for each entry of one axis."""

    root: Value
    order: tuple[int, ...]
    scale: Tensor | None = None
    axis: int | None = None  # of the scale; None if it is one number


def add_shortcut(graph: OperatorGraph, operator: Operator) -> bool:
    """``linear(x) + shortcut * scale``; more of the same shortcut only changes the scale."""
    if operator.function is not _aten.add.Tensor or operator.kwargs:
        return False
    for value, other in (operator.args[:2], operator.args[1::-1]):
        made = product_of(graph, value, plain=False)
        if made is None or not isinstance(other, Value) or other.shape != value.shape:
            continue
        layer = made.function
        if other.dtype != value.dtype or not isinstance(layer, FastLinear):
            continue
        if "factor" in made.kwargs or layer.clips_sum:
            continue
        added = _multiple(other)
        if added.axis not in (None, len(other.shape) - 1):
            added = _itself(other)
        kwargs = dict(made.kwargs)
        if "residual" not in kwargs:
            kwargs["residual"] = other
        else:
            before = _multiple(kwargs["residual"])
            if before.scale is not None or before[:2] != added[:2]:
                continue
            known = kwargs.get("residual_scale")
            scale = _sum(None if known is None else known.constant, added.scale)
            added = added._replace(scale=scale)
        if added.scale is not None:
            order = list(added.order)
            shortcut = graph.insert_before(operator, _aten.permute.default, added.root, order)
            scale = added.scale.float().expand(layer.out_features).contiguous()
            kwargs |= {"residual": shortcut, "residual_scale": Value.of_constant(scale)}
        graph.replace(operator, layer, *made.args, absorbed=[made], **kwargs)
        graph.remove_unused()
        return True
    return False


def _sum(first: Tensor | None, second: Tensor | None) -> Tensor:
    """The sum of two scales, of which None is 1."""
    one = torch.ones(1)
    return (one if first is None else first) + (one if second is None else second)


def _itself(value: Value) -> _Multiple:
    return _Multiple(value, tuple(range(len(value.shape))))


def _multiple(value: Value) -> _Multiple:
    """The map of which another is a multiple, by permutations, constant scales and their sums."""
    made = value.producer
    itself = _itself(value)
    if made is None:
        return itself
    order = order_of(made)
    if order is not None:
        root, inner, scale, axis = _multiple(made.args[0])
        axis = None if axis is None else order.index(axis)
        return _Multiple(root, tuple(inner[a] for a in order), scale, axis)
    if made.function is _aten.mul.Tensor:
        for x, factor in (made.args[:2], made.args[1::-1]):
            if isinstance(x, Value) and x.shape == value.shape:
                return _scaled(_multiple(x), factor, len(value.shape)) or itself
    sums = made.function is _aten.add.Tensor and not made.kwargs
    if sums and all(isinstance(x, Value) and x.shape == value.shape for x in made.args):
        first, second = map(_multiple, made.args)
        axes = {m.axis for m in (first, second)} - {None}
        if first[:2] == second[:2] and len(axes) <= 1:
            return _Multiple(*first[:2], _sum(first.scale, second.scale), *axes or (None,))
    return itself


def _scaled(of: _Multiple, factor: object, rank: int) -> _Multiple | None:
    """The product of a multiple and a constant along at most one axis."""
    if isinstance(factor, Value):
        constant = factor.constant
        if constant is None:
            return None
        shape = [1] * (rank - constant.ndim) + list(constant.shape)
        axes = [axis for axis, size in enumerate(shape) if size > 1]
    else:
        constant, axes = torch.tensor([float(factor)]), []  # type: ignore[arg-type]
    axes += [] if of.axis is None or of.axis in axes else [of.axis]
    if len(axes) > 1:
        return None
    wide = constant.flatten().to(torch.promote_types(constant.dtype, torch.float32))
    scale = wide if of.scale is None else wide * of.scale
    return of._replace(scale=scale, axis=axes[0] if axes else None)


def scale_shortcut(graph: OperatorGraph, operator: Operator) -> bool:
    """``linear(x) + (shift + shortcut * scale)`` with a scale and a shift for each channel."""
    layer, added = operator.function, operator.kwargs.get("residual")
    if not isinstance(layer, FastLinear) or layer.clips_sum or layer.activation != "none":
        return False
    if "residual_scale" in operator.kwargs or not isinstance(added, Value):
        return False
    moved = graph.permuted(added, NHWC)
    affine = graph.made_by(added if moved is None else moved.args[0], _aten.addcmul.default)
    if affine is None or affine.kwargs or graph.only_user(added) is not operator:
        return False
    shift, shortcut, scale = affine.args
    if moved is not None and graph.only_user(affine.result) is not moved:
        return False
    axis = len(shortcut.shape) - 1 if moved is None else 1
    vectors = [per_channel(value, shortcut.shape, axis) for value in (shift, scale)]
    if vectors[0] is None or vectors[1] is None or shortcut.constant is not None:
        return False
    if not shift.dtype == scale.dtype == shortcut.dtype:
        return False
    bias = vectors[0] if layer.bias is None else layer.bias + vectors[0]
    if moved is not None:
        shortcut = graph.insert_before(operator, _aten.permute.default, shortcut, NHWC)
    made = linear(layer.weight, bias, layer.quantization)
    scales = Value.of_constant(vectors[1].float())
    kwargs = {**operator.kwargs, "residual": shortcut, "residual_scale": scales}
    graph.replace(operator, made, *operator.args, **kwargs)
    graph.remove_unused()
    return True
