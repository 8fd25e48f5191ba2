"""Lifting: operators of ATen with constant weights become layers.

A pointwise convolution becomes a linear layer between two permutations, which are views of a
channels-last map, so that all that follows knows one kind of product.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ops.attention.softmax import softmax_attention
from ops.cpu import policy
from ops.cpu.attention.grouped import attend, grouped_attention
from ops.cpu.norm.norms import rms_norm
from ops.cpu.pooling.window_means import window_means
from ops.cpu.pooling.window_pool import window_pool
from ops.inference.conv import FastDepthwiseConv2d, FastMultipliedConv2d
from ops.inference.layers import FastConv2d, FastLinear
from ops.inference.norm import FastLayerNorm
from ops.inference.packed_linear import Quantization
from ops.reparam import norm_affine
from ops.rewriting.graph import NCHW, NHWC, Operator, OperatorGraph, Value, is_available

__all__ = [
    "Attention",
    "FastAdaptiveAvgPool2d",
    "FastGlobalAvgPool2d",
    "affine_of",
    "constant_of",
    "convolution",
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
    return _with(layer, weight, bias, quantization)


def convolution(
    weight: Tensor,
    bias: Tensor | None,
    geometry: dict[str, Any],
    quantization: Quantization | None = None,
) -> Any:
    """A convolution with this weight, (out, in / groups, kh, kw), in its inference form.

    Args:
        geometry: ``stride``, ``padding``, ``dilation`` and ``groups``.
    """
    in_channels = weight.shape[1] * geometry["groups"]
    size: Any = tuple(weight.shape[2:])
    kind: type[FastConv2d] = FastConv2d
    if geometry["groups"] == in_channels == len(weight):
        kind = FastDepthwiseConv2d
    elif geometry["groups"] == in_channels > 1:
        kind = FastMultipliedConv2d
    layer = kind(in_channels, len(weight), size, bias=bias is not None, device="meta", **geometry)
    return _with(layer, weight, bias, quantization)


def _with(
    layer: Any, weight: Tensor, bias: Tensor | None, quantization: Quantization | None = None
) -> Any:
    for name, value in (("weight", weight), ("bias", bias)):
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
    """Means of windows of one size, (B, C, H, W) → (B, C, *output_size)."""

    def forward(self, x: Tensor) -> Tensor:
        size: Any = self.output_size
        window = [n // windows for n, windows in zip(x.shape[2:], size, strict=True)]
        out: Tensor = window_means(x.permute(NHWC), window)
        return out.permute(NCHW)


class FastGlobalAvgPool2d(FastAdaptiveAvgPool2d):
    """Means of all pixels, (B, C, H, W) → (B, C, 1, 1)."""

    def __init__(self) -> None:
        super().__init__((1, 1))


# -- rules ---------------------------------------------------------------------------------------


def lift(graph: OperatorGraph, operator: Operator) -> bool:
    """Replace an operator by a layer that computes the same."""
    rule = _RULES.get(operator.function)
    return rule is not None and rule(graph, operator, operator.given)


def constant_of(value: Any) -> Tensor | None:
    """The tensor of a value that is the same in every call, if it is one."""
    return value.constant if isinstance(value, Value) else None


def _linear(graph: OperatorGraph, operator: Operator, given: dict[str, Any]) -> bool:
    weight, bias = constant_of(given["weight"]), constant_of(given["bias"])
    if weight is None or weight.ndim != 2 or (given["bias"] is not None and bias is None):
        return False
    layer = linear(weight, bias, given["weight"].quantization)
    graph.replace(operator, layer, given["input"])
    return True


def _matmul(graph: OperatorGraph, operator: Operator, given: dict[str, Any]) -> bool:
    x, weight = given["self"], constant_of(given["other"])
    if weight is None or weight.ndim != 2 or x.constant is not None or len(x.shape) < 2:
        return False
    graph.replace(operator, linear(weight.T.contiguous(), None), x)
    return True


def _conv2d(graph: OperatorGraph, operator: Operator, given: dict[str, Any]) -> bool:
    weight, bias = constant_of(given["weight"]), constant_of(given["bias"])
    x = given["input"]
    if weight is None or (given["bias"] is not None and bias is None) or len(x.shape) != 4:
        return False
    geometry = {name: _pair(given[name]) for name in ("stride", "padding", "dilation")}
    geometry["groups"] = given["groups"]
    quantization = given["weight"].quantization
    put_convolution(graph, operator, x, weight, bias, geometry, quantization)
    return True


def put_convolution(
    graph: OperatorGraph,
    operator: Operator,
    x: Value,
    weight: Tensor,
    bias: Tensor | None,
    geometry: dict[str, Any],
    quantization: Quantization | None = None,
) -> None:
    """Compute the result of ``operator`` by a convolution of ``x``, (B, C, H, W)."""
    once = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 1}
    if weight.shape[2:] != (1, 1) or geometry != once:
        graph.replace(operator, convolution(weight, bias, geometry, quantization), x)
        return
    pixels = graph.insert_before(operator, _aten.permute.default, x, NHWC)
    layer = linear(weight.flatten(1), bias, quantization)
    made = graph.insert_before(operator, layer, pixels, shape=(*pixels.shape[:3], len(weight)))
    graph.replace(operator, _aten.permute.default, made, NCHW)


def _pair(value: Any) -> tuple[int, int]:
    return (value[0], value[-1])


def _layer_norm(graph: OperatorGraph, operator: Operator, given: dict[str, Any]) -> bool:
    x, shape = given["input"], given["normalized_shape"]
    affine = [given["weight"], given["bias"]]
    if len(shape) != 1 or any(isinstance(a, Value) and a.constant is None for a in affine):
        return False
    neutral = torch.ones, torch.zeros
    weight, bias = (
        make(shape[0], dtype=x.dtype) if a is None else a.constant
        for a, make in zip(affine, neutral, strict=True)
    )
    layer = FastLayerNorm(len(weight), given["eps"], device="meta")
    graph.replace(operator, _with(layer, weight, bias), x)
    return True


def _rms_norm(graph: OperatorGraph, operator: Operator, given: dict[str, Any]) -> bool:
    x, weight, eps = given["input"], constant_of(given["weight"]), given["eps"]
    if weight is None or weight.ndim != 1 or eps is None or weight.dtype != x.dtype:
        return False
    if not is_available(rms_norm, x.dtype):
        return False
    graph.replace(operator, rms_norm, x, Value.of_constant(weight.detach().float()), eps)
    return True


def _batch_norm(graph: OperatorGraph, operator: Operator, given: dict[str, Any]) -> bool:
    x = given["input"]
    mean, var = (constant_of(given[name]) for name in ("running_mean", "running_var"))
    affine = [given["weight"], given["bias"]]
    varies = any(isinstance(a, Value) and a.constant is None for a in affine)
    if given["training"] or mean is None or var is None or varies or len(x.shape) != 4:
        return False
    norm = nn.BatchNorm2d(len(mean), given["eps"], device="meta")
    norm.running_mean, norm.running_var = mean, var
    for name, value in zip(("weight", "bias"), affine, strict=True):
        kept = constant_of(value)
        parameter = None if kept is None else nn.Parameter(kept.detach(), requires_grad=False)
        norm.register_parameter(name, parameter)
    graph.replace(operator, norm.eval(), x)
    return True


def _pool(graph: OperatorGraph, operator: Operator, x: Value, keepdim: bool) -> bool:
    if not x.shape.numel() or not is_available(window_means, x.dtype):
        return False
    layer = FastGlobalAvgPool2d()
    if keepdim:
        graph.replace(operator, layer, x)
    else:
        pooled = graph.insert_before(operator, layer, x, shape=(*x.shape[:2], 1, 1))
        graph.replace(operator, _aten.flatten.using_ints, pooled, 1)
    return True


def _adaptive_pool(graph: OperatorGraph, operator: Operator, given: dict[str, Any]) -> bool:
    x, size = given["self"], given["output_size"]
    if len(x.shape) != 4 or any(m < 1 or n % m for n, m in zip(x.shape[2:], size, strict=True)):
        return False
    if list(size) == [1, 1]:
        return _pool(graph, operator, x, True)
    if not is_available(window_means, x.dtype):
        return False
    graph.replace(operator, FastAdaptiveAvgPool2d(tuple(size)), x)
    return True


def _mean(graph: OperatorGraph, operator: Operator, given: dict[str, Any]) -> bool:
    x, axes = given["self"], given["dim"]
    if len(x.shape) != 4 or given["dtype"] is not None or axes is None:
        return False
    return {a % 4 for a in axes} == {2, 3} and _pool(graph, operator, x, given["keepdim"])


def _window_pool(graph: OperatorGraph, operator: Operator, given: dict[str, Any]) -> bool:
    x, size = given["self"], operator.result.shape
    plain = _pair(given.get("dilation", [1])) == (1, 1) and given.get("divisor_override") is None
    if not plain or len(x.shape) != 4 or not x.shape.numel():
        return False
    if not is_available(window_pool, x.dtype):
        return False
    sides = [_pair(given[name] or given["kernel_size"]) for name in ("kernel_size", "stride")]
    means = operator.function is _aten.avg_pool2d.default
    options = (
        *sides,
        _pair(given["padding"]),
        size[2:],
        means,
        means and given["count_include_pad"],
    )
    pixels = graph.insert_before(operator, _aten.permute.default, x, NHWC)
    shape = (size[0], *size[2:], size[1])
    made = graph.insert_before(operator, window_pool, pixels, *options, shape=shape)
    graph.replace(operator, _aten.permute.default, made, NCHW)
    return True


def _attention(graph: OperatorGraph, operator: Operator, given: dict[str, Any]) -> bool:
    q, k, v = (given[name] for name in ("query", "key", "value"))
    mask = given["attn_mask"]
    # Zeros only let NaN through, as our kernel does.
    masks = mask is not None and (mask.constant is None or bool(mask.constant.any()))
    if (
        masks
        or given["is_causal"]
        or given["dropout_p"]
        or len(q.shape) != 4
        or q.shape[:2] != k.shape[:2]
    ):
        return False
    graph.replace(operator, Attention(given["scale"]), q, k, v)
    return True


def _neutral(graph: OperatorGraph, operator: Operator, given: dict[str, Any]) -> bool:
    """``x + 0`` and ``x * 1``."""
    neutral = 1 if operator.function is _aten.mul.Tensor else 0
    other = given["other"]
    if isinstance(other, Value) or other != neutral or operator.result.shape != given["self"].shape:
        return False
    graph.bypass(operator, given["self"])
    return True


def _pad(graph: OperatorGraph, operator: Operator, given: dict[str, Any]) -> bool:
    """Padding by nothing."""
    if any(given["pad"]):
        return False
    graph.bypass(operator, operator.args[0])
    return True


def _convert(graph: OperatorGraph, operator: Operator, given: dict[str, Any]) -> bool:
    """Conversions to the same dtype."""
    if given["dtype"] != given["self"].dtype or given["copy"] or given["memory_format"]:
        return False
    graph.bypass(operator, given["self"])
    return True


def _cat(graph: OperatorGraph, operator: Operator, given: dict[str, Any]) -> bool:
    """Leave out empty parts, which kernels do not take."""
    parts = [part for part in given["tensors"] if part.shape.numel()]
    same = {part.dtype for part in given["tensors"]} == {operator.result.dtype}
    if len(parts) == len(given["tensors"]) or not parts or not same:
        return False
    if len(parts) == 1 and parts[0].shape == operator.result.shape:
        graph.bypass(operator, parts[0])
        return True
    graph.replace(operator, operator.function, parts, given["dim"])
    return True


_RULES: dict[Any, Callable[[OperatorGraph, Operator, dict[str, Any]], bool]] = {
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
