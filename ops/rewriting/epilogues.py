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
from ops.inference.layers import ActivatedLayer, FastConv2d, FastLinear
from ops.inference.packed_linear import multiplied_weight
from ops.reparam import fold_scale_after
from ops.rewriting.graph import NCHW, NHWC, Operator, OperatorGraph, Value, permuted
from ops.rewriting.lift import affine_of, linear
from ops.rounding import round_filters

__all__ = [
    "activation_kind",
    "add_shortcut",
    "apply_activation",
    "apply_gates",
    "fold_norm",
    "fold_scale",
    "multiply_by_map",
    "split_gated_linear",
]

_aten = torch.ops.aten
_SPLITS = (_aten.chunk.default, _aten.split.Tensor, _aten.split_with_sizes.default)
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


def _product_of(value: Any) -> Operator | None:
    """The linear layer or convolution that computes a value, if it has no epilogue yet.

    Only one operator may use the value.
    """
    match value:
        case Value(
            FastLinear(activation="none") | FastConv2d(activation="none"), producer=made, once=True
        ) if not made.kwargs.keys() & {"residual", "factor"}:
            return made
    return None


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


def fold_norm(graph: OperatorGraph, operator: Operator) -> None:
    """``batch_norm(conv(x))`` → ``conv'(x)``."""
    match operator:
        case Operator(nn.BatchNorm2d() as norm, [Value(once=True) as x]):
            inner = permuted(x, NCHW)
            made = _product_of(x if inner is None else inner)
            # Without a permutation, the channels of a linear layer are another axis.
            if made is not None and (inner is not None) == isinstance(made.function, FastLinear):
                graph.change(made, _folded(made.function, *affine_of(norm)))
                graph.substitute(operator.result, x)


def fold_scale(graph: OperatorGraph, operator: Operator) -> None:
    """``layer(x) * scale`` → ``layer'(x)``, with a number or one for each channel."""
    multiplies = operator.function is _aten.mul.Tensor
    if not (multiplies or operator.function is _aten.add.Tensor) or operator.kwargs:
        return
    result = operator.result
    for value, other in operator.in_both_orders:
        made = _product_of(value)
        if made is None or (result.shape, result.dtype) != (value.shape, value.dtype):
            continue
        vector = _per_channel(other, value.shape, -1 if isinstance(made.function, nn.Linear) else 1)
        if vector is not None:
            factors = (vector,) if multiplies else (torch.ones_like(vector), vector)
            graph.change(made, _folded(made.function, *factors))
            graph.substitute(result, value)
            return


def _per_channel(other: Any, shape: torch.Size, axis: int) -> Tensor | None:
    """The numbers of the channels, if ``other`` is constant along all other axes."""
    channels = shape[axis]
    constant = other.constant if isinstance(other, Value) else torch.tensor(float(other))
    if constant is None or constant.numel() not in (1, channels):
        return None
    if constant.numel() == 1:
        return constant.reshape(1).expand(channels).clone()
    aligned = [1] * (len(shape) - constant.ndim) + list(constant.shape)
    return constant.flatten() if aligned[axis] == channels else None


def apply_activation(graph: OperatorGraph, operator: Operator) -> None:
    """``activation(layer(x))``, also after a layer norm or a kernel that applies one.

    The square of a ReLU is one, https://arxiv.org/abs/2109.08668.
    """
    squares = operator.function in _SQUARES and operator.args[1:] in ([], [2])
    kind = "squared_relu" if squares else activation_kind(operator)
    before = "relu" if squares else "none"
    if kind is None or not operator.args[0].once:
        return
    match operator.args[0].producer:
        case Operator(Kernel(activation_index=int(at)), args=args) if args[at:] == [before]:
            args[at] = kind
        case Operator(ActivatedLayer() as layer, kwargs=kwargs) if layer.activation == before:
            if others := kwargs.keys() & {"residual", "residual_scale", "factor"}:
                clips = others == {"residual"} and kind in ("relu", "relu6")
                if not clips or not isinstance(layer, FastLinear):
                    return
                layer.clips_sum = True
            layer.activation = kind
        case _:
            return
    graph.change(operator.args[0].producer)
    graph.substitute(operator.result, operator.args[0])


def apply_gates(graph: OperatorGraph, operator: Operator) -> None:
    """``linear(permute(x * gates))`` → ``linear(permute(x), scale=gates)``."""
    layer, moved = operator.function, operator.args[0]
    if not isinstance(layer, FastLinear) or "scale" in operator.kwargs or not moved.once:
        return
    match permuted(moved, NHWC):
        case Value(_aten.mul.Tensor, producer=made, once=True) as product:
            shape = (*product.shape[:2], 1, 1)
        case _:
            return
    for x, gates in made.in_both_orders:
        of_channels = isinstance(gates, Value) and gates.shape == shape
        if product.is_like(x) and of_channels and gates.dtype == x.dtype:
            pixels = graph.insert_before(operator, _aten.permute.default, x, NHWC)
            scale = graph.insert_before(operator, _aten.flatten.using_ints, gates, 1)
            kwargs = {**operator.kwargs, "scale": scale}
            graph.replace(operator, layer, pixels, absorbed=made, **kwargs)
            return


def multiply_by_map(graph: OperatorGraph, operator: Operator) -> None:
    """``activation(linear(x)) * map`` with one value for each output."""
    if operator.function is not _aten.mul.Tensor:
        return
    for value, other in operator.in_both_orders:
        match value:
            case Value(FastLinear() as layer, [x], producer=made, once=True) if value.is_like(
                other
            ):
                graph.replace(operator, layer, x, absorbed=made, factor=other)
                return


def split_gated_linear(graph: OperatorGraph, operator: Operator) -> None:
    """``activation(h[0]) * h[1]`` for the halves ``h`` of one linear layer, which become two.

    As in SwiGLU and its relatives, https://arxiv.org/abs/2002.05202.
    """
    if operator.function not in _SPLITS or len(operator.results) != 2:
        return
    halves = operator.results
    users = [half.user for half in halves]
    gated = any(
        user is not None
        and activation_kind(user) is not None
        and user.result.user is other is not None
        and other.function is _aten.mul.Tensor
        for user, other in (users, users[::-1])
    )
    match operator.args[0]:
        case Value(FastLinear(activation="none") as layer, [x], once=True) as whole:
            width = whole.shape[-1]
        case _:
            return
    is_last = (operator.given["dim"] + 1) % len(whole.shape) == 0
    if not gated or not is_last or any(2 * half.shape[-1] != width for half in halves):
        return
    biases = (None, None) if layer.bias is None else layer.bias.chunk(2)
    for half, weight, bias in zip(halves, layer.weight.chunk(2), biases, strict=True):
        part = linear(weight, bias, layer.quantization)
        graph.substitute(half, graph.insert_before(operator, part, x, shape=half.shape))


class _Multiple(NamedTuple):
    """A map as ``root * scale + shift``, permuted to NHWC if ``is_moved``."""

    root: Value
    is_moved: bool
    scale: Tensor | None = None
    shift: Tensor | None = None


def add_shortcut(graph: OperatorGraph, operator: Operator) -> None:
    """``linear(x) + shortcut * scale``; more of the same shortcut only changes the scale."""
    if operator.function is not _aten.add.Tensor or operator.kwargs:
        return
    for value, other in operator.in_both_orders:
        match value:
            case Value(FastLinear(clips_sum=False) as layer, producer=made, once=True) if (
                value.is_like(other) and "factor" not in made.kwargs
            ):
                kwargs = dict(made.kwargs)
            case _:
                continue
        root, is_moved, scale, shift = _multiple(other)
        if shift is not None and layer.activation == "none" and "residual" not in kwargs:
            layer = _folded(layer, torch.ones_like(shift), shift)
        elif shift is not None:
            root, is_moved, scale = other, False, None
        before = _multiple(kwargs["residual"]) if "residual" in kwargs else None
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
        graph.replace(operator, layer, *made.args, absorbed=made, **kwargs)
        return


def _multiple(value: Value) -> _Multiple:
    """The map of which another is a multiple, perhaps shifted, with numbers for each channel."""
    moved = permuted(value, NHWC)
    root, axis = (value, -1) if moved is None else (moved, 1)
    scale = shift = None
    match root:
        case Value(_aten.mul.Tensor, [*factors]):
            added = None
        case Value(_aten.addcmul.default, [added, *factors]):
            pass
        case _:
            factors = []
    for x, factor in (factors, factors[::-1]) if factors else ():
        if root.is_like(x):
            scale = _per_channel(factor, x.shape, axis)
        if scale is not None and added is not None:
            shift = _per_channel(added, x.shape, axis)
            scale = None if shift is None else scale
        if scale is not None:
            root = x
            break
    back = None if moved is None else permuted(root, NCHW)
    return _Multiple(
        root if back is None else back, moved is not None and back is None, scale, shift
    )
