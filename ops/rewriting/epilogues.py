"""Epilogues: what follows a product is applied while its results are in registers.

Batch norms and constant scales are folded into the weights; activations, shortcuts, products with
other maps and the gates of squeeze-and-excitation are applied by the kernel.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ops.cpu.activations import ACTIVATIONS, activation_of
from ops.cpu.call.binding import Kernel
from ops.inference.layers import ActivatedLayer, FastLinear
from ops.inference.packed_linear import multiplied_weight
from ops.reparam import fold_scale_after
from ops.rewriting.graph import NCHW, NHWC, Operator, OperatorGraph, Value
from ops.rewriting.lift import affine_of
from ops.rounding import round_filters

__all__ = [
    "activation_kind",
    "add_shortcut",
    "apply_activation",
    "apply_gates",
    "fold_norm",
    "fold_scale",
    "multiply_by_map",
    "per_channel",
    "product_of",
]

_aten = torch.ops.aten
_SQUARES = (_aten.square.default, _aten.pow.Tensor_Scalar)
_OPERATORS = {call: name for name in ACTIVATIONS for call in activation_of(name).operators}

_FUNCTIONS = {function for function, *_ in _OPERATORS}


def activation_kind(operator: Operator) -> str | None:
    """The activation that an operator applies, as kernels name it."""
    if operator.function not in _FUNCTIONS:
        return None
    given = operator.args[1:] + list(operator.kwargs.values())
    if operator.function is _aten.gelu.default and not given:
        given = ["none"]
    return _OPERATORS.get((operator.function, *given))


def product_of(graph: OperatorGraph, value: Any, *, plain: bool) -> Operator | None:
    """The linear layer or convolution that computes a value, if only one operator uses it.

    Args:
        plain: whether it must not have an epilogue yet.
    """
    made = graph.made_by(value, FastLinear, nn.Conv2d)
    if made is None or graph.only_user(value) is None:
        return None
    layer: Any = made.function
    if not isinstance(layer, ActivatedLayer):
        return None
    has_epilogue = layer.activation != "none" or made.kwargs.keys() & {"residual", "factor"}
    return None if plain and has_epilogue else made


def _folded(layer: Any, scale: Tensor, shift: Tensor | None = None) -> Any:
    """``layer(x) * scale + shift``, rounded as ``fuse()`` does, or with the same int8."""
    dtype = layer.weight.dtype
    wide = torch.promote_types(dtype, torch.float32)
    shift = None if shift is None else shift.to(wide)
    exact = copy.copy(layer)
    weight = multiplied_weight(layer.weight.detach(), layer.quantization)
    exact._parameters = {**layer._parameters, "weight": nn.Parameter(weight, requires_grad=False)}
    folded = fold_scale_after(exact, scale.to(wide), shift)
    if layer.quantization is None:
        round_filters(folded, dtype)
    return folded.to(dtype)


def fold_norm(graph: OperatorGraph, operator: Operator) -> bool:
    """``batch_norm(conv(x))`` → ``conv'(x)``."""
    if type(operator.function) is not nn.BatchNorm2d:
        return False
    x = operator.args[0]
    permuted = graph.permuted(x, NCHW)
    made = product_of(graph, x if permuted is None else permuted.args[0], plain=True)
    if made is None or graph.only_user(x) is not operator:
        return False
    if (permuted is None) == isinstance(made.function, FastLinear):
        return False  # its channels are another axis
    graph.change(made, _folded(made.function, *affine_of(operator.function)))
    graph.bypass(operator, x)
    return True


def fold_scale(graph: OperatorGraph, operator: Operator) -> bool:
    """``layer(x) * scale`` → ``layer'(x)``, with a number or one for each channel."""
    if operator.function not in (_aten.mul.Tensor, _aten.add.Tensor) or operator.kwargs:
        return False
    for value, other in (operator.args[:2], operator.args[1::-1]):
        made = product_of(graph, value, plain=True)
        result = operator.result
        if made is None or result.shape != value.shape or result.dtype != value.dtype:
            continue
        vector = per_channel(other, value.shape, -1 if isinstance(made.function, nn.Linear) else 1)
        if vector is None:
            continue
        layer: Any = made.function
        if operator.function is _aten.mul.Tensor:
            graph.change(made, _folded(layer, vector))
        else:
            graph.change(made, _folded(layer, torch.ones_like(vector), vector))
        graph.bypass(operator, value)
        return True
    return False


def per_channel(other: Any, shape: torch.Size, axis: int) -> Tensor | None:
    """The numbers of the channels, if ``other`` is constant along all other axes."""
    channels = shape[axis]
    if isinstance(other, int | float):
        return torch.full((channels,), float(other))
    constant = other.constant
    if constant is None or constant.numel() not in (1, channels):
        return None
    if constant.numel() == 1:
        return constant.reshape(1).expand(channels).clone()
    aligned = [1] * (len(shape) - constant.ndim) + list(constant.shape)
    return constant.flatten() if aligned[axis] == channels else None


def apply_activation(graph: OperatorGraph, operator: Operator) -> bool:
    """``activation(layer(x))``, also after a layer norm or a kernel that applies one.

    The square of a ReLU is one, https://arxiv.org/abs/2109.08668.
    """
    squares = operator.function in _SQUARES and operator.args[1:] in ([], [2])
    kind = "squared_relu" if squares else activation_kind(operator)
    before = "relu" if squares else "none"
    made = operator.args[0].producer if kind is not None else None
    if kind is None or made is None or graph.only_user(operator.args[0]) is not operator:
        return False
    layer: Any = made.function
    others = made.kwargs.keys() & {"residual", "residual_scale", "factor"}
    if isinstance(layer, Kernel):
        at = layer.activation_index
        if at is None or made.args[at:] != [before]:
            return False
        made.args[at] = kind
    elif not isinstance(layer, ActivatedLayer) or layer.activation != before:
        return False
    elif not others:
        layer.activation = kind
    elif isinstance(layer, FastLinear) and others == {"residual"} and kind in ("relu", "relu6"):
        layer.activation, layer.clips_sum = kind, True
    else:
        return False
    graph.change(made)
    graph.bypass(operator, operator.args[0])
    return True


def apply_gates(graph: OperatorGraph, operator: Operator) -> bool:
    """``linear(permute(x * gates))`` → ``linear(permute(x), scale=gates)``."""
    if not isinstance(operator.function, FastLinear) or "scale" in operator.kwargs:
        return False
    permuted = graph.permuted(operator.args[0], NHWC)
    product = None if permuted is None else graph.made_by(permuted.args[0], _aten.mul.Tensor)
    if permuted is None or product is None:
        return False
    if graph.only_user(product.result) is not permuted:
        return False
    for x, gates in (product.args[:2], product.args[1::-1]):
        if not isinstance(x, Value) or not isinstance(gates, Value):
            continue
        if x.shape != product.result.shape or gates.shape != (*x.shape[:2], 1, 1):
            continue
        if x.dtype != gates.dtype:
            continue
        if graph.only_user(permuted.result) is not operator:
            return False
        pixels = graph.insert_before(operator, _aten.permute.default, x, NHWC)
        scale = graph.insert_before(operator, _aten.flatten.using_ints, gates, 1)
        kwargs = {**operator.kwargs, "scale": scale}
        graph.replace(operator, operator.function, pixels, absorbed=[permuted, product], **kwargs)
        return True
    return False


def multiply_by_map(graph: OperatorGraph, operator: Operator) -> bool:
    """``activation(linear(x)) * map`` with one value for each output."""
    if operator.function is not _aten.mul.Tensor:
        return False
    for value, other in (operator.args[:2], operator.args[1::-1]):
        made = product_of(graph, value, plain=False)
        if made is None or not isinstance(other, Value) or other.shape != value.shape:
            continue
        if other.dtype != value.dtype or not isinstance(made.function, FastLinear):
            continue
        if made.kwargs.keys() & {"residual", "factor", "scale"}:
            continue
        graph.replace(operator, made.function, *made.args, absorbed=[made], factor=other)
        return True
    return False


class _Multiple(NamedTuple):
    """A map as ``root * scale + shift``, permuted to NHWC if ``is_moved``."""

    root: Value
    is_moved: bool
    scale: Tensor | None = None
    shift: Tensor | None = None


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
        root, is_moved, scale, shift = _multiple(graph, other)
        if shift is not None and layer.activation == "none" and "residual" not in kwargs:
            layer = _folded(layer, torch.ones_like(shift), shift)
        elif shift is not None:
            root, is_moved, scale = other, False, None
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
    """The map of which another is a multiple, perhaps shifted, with numbers for each channel."""
    moved = graph.permuted(value, NHWC)
    root: Value = value if moved is None else moved.args[0]
    scale = shift = None
    axis = -1 if moved is None else 1
    product = graph.made_by(root, _aten.mul.Tensor, _aten.addcmul.default)
    factors = [] if product is None or product.kwargs else product.args[-2:]
    for x, factor in (factors, factors[::-1]) if factors else ():
        if isinstance(x, Value) and x.shape == root.shape and x.dtype == root.dtype:
            scale = per_channel(factor, x.shape, axis)
        if scale is not None and product is not None and len(product.args) == 3:
            shift = per_channel(product.args[0], x.shape, axis)
            scale = None if shift is None else scale
        if scale is not None:
            root = x
            break
    back = None if moved is None else graph.permuted(root, NCHW)
    if back is not None:
        return _Multiple(back.args[0], False, scale, shift)
    return _Multiple(root, moved is not None, scale, shift)
