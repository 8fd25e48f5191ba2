"""Shortcuts: a linear layer adds another map, or a multiple of it, to its results."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ops.inference.layers import FastLinear
from ops.rewriting.epilogues import per_channel, product_of
from ops.rewriting.graph import NHWC, Operator, OperatorGraph, Value

__all__ = ["add_shortcut"]

_aten = torch.ops.aten


class _Multiple(NamedTuple):
    """A map as ``root * scale``, permuted to NHWC if ``is_moved``."""

    root: Value
    is_moved: bool
    scale: Tensor | None = None


def add_shortcut(graph: OperatorGraph, operator: Operator) -> bool:
    """``linear(x) + shortcut * scale``; more of the same shortcut only changes the scale."""
    if operator.function is not _aten.add.Tensor or operator.kwargs:
        return False
    for value, other in (operator.args[:2], operator.args[1::-1]):
        made = product_of(graph, value, plain=False)
        if made is None or not isinstance(other, Value) or other.shape != value.shape:
            continue
        layer, kwargs = made.function, dict(made.kwargs)
        if other.dtype != value.dtype or not isinstance(layer, FastLinear):
            continue
        if "factor" in kwargs or layer.clips_sum:
            continue
        root, is_moved, scale = _multiple(graph, other)
        before = _multiple(graph, kwargs["residual"]) if "residual" in kwargs else None
        if before is None:
            kwargs["residual"] = other
        elif before[:2] == (root, is_moved) and before.scale is None:
            known = kwargs.get("residual_scale")
            one = torch.ones(layer.out_features)
            scale = (one if known is None else known.constant) + (one if scale is None else scale)
        else:
            continue
        if scale is not None:
            if is_moved:
                root = graph.insert_before(operator, _aten.permute.default, root, NHWC)
            kwargs |= {"residual": root, "residual_scale": Value.of_constant(scale.float())}
        graph.replace(operator, layer, *made.args, absorbed=[made], **kwargs)
        graph.remove_unused()
        return True
    return False


def _multiple(graph: OperatorGraph, value: Value) -> _Multiple:
    """The map of which another is a multiple, with a number or one for each channel."""
    moved = graph.permuted(value, NHWC)
    source = value if moved is None else moved.args[0]
    product = graph.made_by(source, _aten.mul.Tensor)
    for x, factor in () if product is None else (product.args[:2], product.args[1::-1]):
        if not isinstance(x, Value) or x.shape != source.shape or x.dtype != source.dtype:
            continue
        scale = per_channel(factor, x.shape, -1 if moved is None else 1)
        if scale is not None:
            return _Multiple(x, moved is not None, scale)
    return _Multiple(source, moved is not None)
