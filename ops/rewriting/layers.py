"""Layers made from operators: a product or a norm with the weights that an operator was given."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from ops.attention.softmax import softmax_attention
from ops.cpu import policy
from ops.cpu.attention.grouped import attend, grouped_attention
from ops.cpu.pooling.window_means import window_means
from ops.inference.conv import FastDepthwiseConv2d, FastMultipliedConv2d
from ops.inference.layers import FastConv2d, FastLinear
from ops.inference.norm import FastLayerNorm
from ops.inference.packed_linear import Quantization
from ops.reparam import norm_affine
from ops.rewriting.graph import NCHW, NHWC

__all__ = [
    "Attention",
    "FastAdaptiveAvgPool2d",
    "FastGlobalAvgPool2d",
    "affine_of",
    "convolution",
    "layer_norm",
    "linear",
]


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


def layer_norm(weight: Tensor, bias: Tensor, eps: float) -> Any:
    """A layer norm over the last axis, in its inference form."""
    return _with(FastLayerNorm(len(weight), eps, device="meta"), weight, bias)


def _with(
    layer: Any, weight: Tensor, bias: Tensor | None, quantization: Quantization | None = None
) -> Any:
    for name, value in (("weight", weight), ("bias", bias)):
        kept = None if value is None else nn.Parameter(value.detach(), requires_grad=False)
        layer.register_parameter(name, kept)
    if quantization is not None:
        layer.quantization = quantization
    return layer.eval()


def affine_of(norm: nn.BatchNorm1d | nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
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
