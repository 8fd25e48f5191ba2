"""Lifting: operators of ATen with constant weights become layers.

A pointwise convolution becomes a linear layer between two permutations, which are views of a
channels-last map, so that all that follows knows one kind of product.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ops.attention.softmax import softmax_attention
from ops.cpu import policy
from ops.cpu.attention.grouped import attend, grouped_attention
from ops.cpu.call.binding import Kernel
from ops.cpu.norm.norms import rms_norm
from ops.cpu.pooling.window_means import window_means
from ops.cpu.pooling.window_pool import window_pool
from ops.inference.conv import FastDepthwiseConv2d
from ops.inference.layers import FastConv2d, FastLinear
from ops.inference.norm import FastLayerNorm
from ops.inference.packed_linear import Quantization
from ops.reparam import norm_affine
from ops.rewriting.graph import NCHW, NHWC, Operator, OperatorGraph, Value, is_available

__all__ = [
    "Attention",
    "FastAdaptiveAvgPool2d",
    "affine_of",
    "constant_of",
    "lift",
    "linear",
    "put_convolution",
]

_aten = torch.ops.aten


# -- layers --------------------------------------------------------------------------------------


def linear(
    weight: Tensor, bias: Tensor | None, quantization: Quantization | None = None
) -> FastLinear:
    """A linear layer with this weight, (out_features, in_features), in its inference form."""
    layer = FastLinear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    return _with(layer, weight, bias, quantization=quantization)


def _with(layer: Any, *tensors: Tensor | None, quantization: Quantization | None = None) -> Any:
    for name, value in zip(("weight", "bias"), tensors, strict=True):
        kept = None if value is None else nn.Parameter(value.detach(), requires_grad=False)
        layer.register_parameter(name, kept)
    if quantization is not None:
        layer.quantization = quantization
    return layer.eval()


def affine_of(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Scale and shift (C,) of a batch norm, in float32 or wider."""
    wide = copy.deepcopy(norm)
    return norm_affine(wide.float() if norm.running_mean.itemsize < 4 else wide)  # type: ignore[union-attr]


class Attention(nn.Module):
    """softmax(scale · query · keyᵀ) · value, (B, heads, N, head_dim) each, without copies."""

    def __init__(self, scale: float | None) -> None:
        super().__init__()
        self.scale = scale

    def extra_repr(self) -> str:
        return f"scale={self.scale}"

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        own = grouped_attention.unavailable(query.device, query.dtype) is None
        if not own or not policy.softmax_attention_by_kernel(key.shape[2], query.dtype):
            return softmax_attention(query, key, value, self.scale)
        query, key, value = (t.transpose(1, 2) for t in (query, key, value))
        out = query.new_empty(*query.shape[:3], value.shape[3])
        attend(query, key, value, out, self.scale)
        return out.transpose(1, 2)


class FastAdaptiveAvgPool2d(nn.AdaptiveAvgPool2d):
    """Means of windows, (B, C, H, W) → (B, C, *output_size); by our kernel if of one size."""

    def forward(self, x: Tensor) -> Tensor:
        size: Any = self.output_size
        if any(n % windows for n, windows in zip(x.shape[2:], size, strict=True)):
            return super().forward(x)
        window = [n // windows for n, windows in zip(x.shape[2:], size, strict=True)]
        out: Tensor = window_means(x.permute(NHWC), window)
        return out.permute(NCHW)


class WindowPool(nn.Module):
    """Maxima or means of windows, (B, H, W, C) → (B, H', W', C).

    Args:
        given: the arguments of ``max_pool2d`` or ``avg_pool2d`` by name.
        means: means instead of maxima.
    """

    def __init__(self, given: Mapping[str, Any], *, means: bool) -> None:
        super().__init__()
        self.kernel_size = _pair(given["kernel_size"])
        self.stride = _pair(given["stride"] or given["kernel_size"])
        self.padding, self.ceil_mode = _pair(given["padding"]), given["ceil_mode"]
        self.means, self.counts = means, means and given["count_include_pad"]

    def extra_repr(self) -> str:
        names = "kernel_size", "stride", "padding", "ceil_mode", "means", "counts"
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)

    def forward(self, x: Tensor) -> Tensor:
        windows = self.kernel_size, self.stride, self.padding
        given = zip(x.shape[1:3], *windows, strict=True)
        size = [self._length(*axis) for axis in given]
        out: Tensor = window_pool(x, *windows, size, self.means, self.counts)
        return out

    def _length(self, length: int, side: int, step: int, padding: int) -> int:
        room = length + 2 * padding - side
        if not self.ceil_mode:
            return room // step + 1
        windows = -(-room // step) + 1
        return windows - ((windows - 1) * step >= length + padding)  # one that begins in padding


# -- rules ---------------------------------------------------------------------------------------


def lift(graph: OperatorGraph, operator: Operator) -> None:
    """Replace an operator by a layer that computes the same."""
    if rule := _RULES.get(operator.function):
        rule(graph, operator, operator.given)


def constant_of(value: Any) -> Tensor | None:
    """The tensor of a value that is the same in every call, if it is one."""
    return value.constant if isinstance(value, Value) else None


def _constants(given: dict[str, Any], *names: str) -> list[Tensor | None] | None:
    """These arguments, of which some may be missing; None if any varies."""
    constants = [constant_of(given[name]) for name in names]
    varies = any(
        given[name] is not None and constant is None
        for name, constant in zip(names, constants, strict=True)
    )
    return None if varies else constants


def _linear(graph: OperatorGraph, operator: Operator, given: dict[str, Any]) -> None:
    match _constants(given, "weight", "bias"):
        case [Tensor(ndim=2) as weight, bias]:
            layer = linear(weight, bias, given["weight"].quantization)
            graph.replace(operator, layer, given["input"])


def _matmul(graph: OperatorGraph, operator: Operator, given: dict[str, Any]) -> None:
    x, weight = given["self"], constant_of(given["other"])
    if weight is not None and weight.ndim == 2 and x.constant is None and len(x.shape) >= 2:
        graph.replace(operator, linear(weight.T.contiguous(), None), x)


def _conv2d(graph: OperatorGraph, operator: Operator, given: dict[str, Any]) -> None:
    x, geometry = given["input"], {"groups": given["groups"]}
    match _constants(given, "weight", "bias"):
        case [Tensor() as weight, bias] if len(x.shape) == 4:
            geometry |= {name: _pair(given[name]) for name in ("stride", "padding", "dilation")}
            quantization = given["weight"].quantization
            put_convolution(graph, operator, x, weight, bias, geometry, quantization)


def put_convolution(
    graph: OperatorGraph,
    operator: Operator,
    x: Value,
    weight: Tensor,
    bias: Tensor | None,
    geometry: dict[str, Any],
    quantization: Quantization | None = None,
) -> None:
    """Compute the result of ``operator`` by a convolution of ``x``, (B, C, H, W).

    Args:
        weight: (out, in / groups, kh, kw).
        geometry: ``stride``, ``padding``, ``dilation`` and ``groups``.
    """
    once = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 1}
    if weight.shape[2:] != (1, 1) or geometry != once:
        groups, channels, size = geometry["groups"], x.shape[1], tuple(weight.shape[2:])
        depthwise = groups == channels and (channels > 1 or len(weight) == 1)
        kind: Any = FastDepthwiseConv2d if depthwise else FastConv2d
        layer = kind(channels, len(weight), size, bias=bias is not None, device="meta", **geometry)
        graph.replace(operator, _with(layer, weight, bias, quantization=quantization), x)
        return
    pixels = graph.insert_before(operator, _aten.permute.default, x, NHWC)
    layer = linear(weight.flatten(1), bias, quantization)
    made = graph.insert_before(operator, layer, pixels, shape=(*pixels.shape[:3], len(weight)))
    graph.replace(operator, _aten.permute.default, made, NCHW)


def _pair(value: Any) -> tuple[int, int]:
    return (value[0], value[-1])


def _layer_norm(graph: OperatorGraph, operator: Operator, given: dict[str, Any]) -> None:
    x, shape, affine = (
        given["input"],
        given["normalized_shape"],
        _constants(given, "weight", "bias"),
    )
    if affine is None or len(shape) != 1:
        return
    weight, bias = (
        make(shape[0], dtype=x.dtype) if constant is None else constant
        for constant, make in zip(affine, (torch.ones, torch.zeros), strict=True)
    )
    layer = FastLayerNorm(len(weight), given["eps"], device="meta")
    graph.replace(operator, _with(layer, weight, bias), x)


def _rms_norm(graph: OperatorGraph, operator: Operator, given: dict[str, Any]) -> None:
    x, weight, eps = given["input"], constant_of(given["weight"]), given["eps"]
    if weight is None or weight.ndim != 1 or eps is None or weight.dtype != x.dtype:
        return
    if is_available(rms_norm, x.dtype):
        graph.replace(operator, rms_norm, x, Value.of_constant(weight.detach().float()), eps)


def _batch_norm(graph: OperatorGraph, operator: Operator, given: dict[str, Any]) -> None:
    x = given["input"]
    match _constants(given, "running_mean", "running_var", "weight", "bias"):
        case [Tensor() as mean, Tensor() as var, weight, bias] if (
            not given["training"] and len(x.shape) == 4
        ):
            norm = nn.BatchNorm2d(len(mean), given["eps"], device="meta")
            norm.running_mean, norm.running_var = mean, var
            graph.replace(operator, _with(norm, weight, bias), x)


def _pools(kernel: Kernel, x: Value) -> bool:
    """Whether a kernel pools maps like this one."""
    return len(x.shape) == 4 and x.shape.numel() > 0 and is_available(kernel, x.dtype)


def _adaptive_pool(graph: OperatorGraph, operator: Operator, given: dict[str, Any]) -> None:
    x, size = given["self"], tuple(given["output_size"])
    if not _pools(window_means, x) or any(
        windows < 1 or n % windows for n, windows in zip(x.shape[2:], size, strict=True)
    ):
        return
    graph.replace(operator, FastAdaptiveAvgPool2d(size), x)


def _mean(graph: OperatorGraph, operator: Operator, given: dict[str, Any]) -> None:
    x, layer = given["self"], FastAdaptiveAvgPool2d((1, 1))
    if not _pools(window_means, x) or given["dtype"] is not None:
        return
    if {axis % 4 for axis in given["dim"] or ()} != {2, 3}:
        return
    if given["keepdim"]:
        graph.replace(operator, layer, x)
    else:
        pooled = graph.insert_before(operator, layer, x, shape=(*x.shape[:2], 1, 1))
        graph.replace(operator, _aten.flatten.using_ints, pooled, 1)


def _window_pool(graph: OperatorGraph, operator: Operator, given: dict[str, Any]) -> None:
    x, size = given["self"], operator.result.shape
    plain = _pair(given.get("dilation", [1])) == (1, 1) and given.get("divisor_override") is None
    if not plain or not _pools(window_pool, x):
        return
    pixels = graph.insert_before(operator, _aten.permute.default, x, NHWC)
    shape = (size[0], *size[2:], size[1])
    layer = WindowPool(given, means=operator.function is _aten.avg_pool2d.default)
    made = graph.insert_before(operator, layer, pixels, shape=shape)
    graph.replace(operator, _aten.permute.default, made, NCHW)


def _attention(graph: OperatorGraph, operator: Operator, given: dict[str, Any]) -> None:
    q, k, v = (given[name] for name in ("query", "key", "value"))
    mask = given["attn_mask"]
    # Zeros only let NaN through, as our kernel does.
    masks = mask is not None and (mask.constant is None or bool(mask.constant.any()))
    plain = not (masks or given["is_causal"] or given["dropout_p"])
    if plain and len(q.shape) == 4 and q.shape[:2] == k.shape[:2]:
        graph.replace(operator, Attention(given["scale"]), q, k, v)


def _neutral(graph: OperatorGraph, operator: Operator, given: dict[str, Any]) -> None:
    """``x + 0`` and ``x * 1``."""
    x, other = given["self"], given["other"]
    neutral = 1 if operator.function is _aten.mul.Tensor else 0
    if not isinstance(other, Value) and other == neutral and operator.result.shape == x.shape:
        graph.substitute(operator.result, x)


def _pad(graph: OperatorGraph, operator: Operator, given: dict[str, Any]) -> None:
    """Padding by nothing."""
    if not any(given["pad"]):
        graph.substitute(operator.result, given["self"])


def _convert(graph: OperatorGraph, operator: Operator, given: dict[str, Any]) -> None:
    """Conversions to the same dtype."""
    x = given["self"]
    if given["dtype"] == x.dtype and not given["copy"] and not given["memory_format"]:
        graph.substitute(operator.result, x)


def _cat(graph: OperatorGraph, operator: Operator, given: dict[str, Any]) -> None:
    """A whole beside empty parts."""
    parts = [part for part in given["tensors"] if part.shape.numel()]
    if len(parts) == 1 and parts[0].is_like(operator.result):
        graph.substitute(operator.result, parts[0])


_RULES: dict[Any, Callable[[OperatorGraph, Operator, dict[str, Any]], None]] = {
    _aten.pad.default: _pad,
    _aten.constant_pad_nd.default: _pad,
    _aten.cat.default: _cat,
    _aten.to.dtype: _convert,
    _aten.add.Tensor: _neutral,
    _aten.mul.Tensor: _neutral,
    _aten.linear.default: _linear,
    _aten.matmul.default: _matmul,
    _aten.conv2d.default: _conv2d,
    _aten.layer_norm.default: _layer_norm,
    _aten.rms_norm.default: _rms_norm,
    _aten.batch_norm.default: _batch_norm,
    _aten.adaptive_avg_pool2d.default: _adaptive_pool,
    _aten.mean.dim: _mean,
    _aten.max_pool2d.default: _window_pool,
    _aten.avg_pool2d.default: _window_pool,
    _aten.scaled_dot_product_attention.default: _attention,
}
