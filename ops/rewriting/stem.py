"""Stems: an image's first convolutions, 3×3 of stride 2, run in one pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ops.cpu import policy
from ops.cpu.stem.packed_stem import pack_layers, packed_stem
from ops.inference.layers import FastConv2d, FastLayer, is_quantized
from ops.inference.norm import FastLayerNorm
from ops.rewriting.graph import NCHW, NHWC, Operator, OperatorGraph, permuted

__all__ = ["Stem", "join_stem"]

_permute = torch.ops.aten.permute.default


class Stem(FastLayer):
    """Convolutions with their activations, each with a layer norm or None, see :func:`packed_stem`.

    (B, C, H, W) → (B, C', H', W').
    """

    def __init__(self, convs: list[Any], norms: list[Any]) -> None:
        super().__init__()
        self.convs, self.norms = nn.ModuleList(convs), nn.ModuleList(norms)

    def forward(self, x: Tensor) -> Tensor:
        packed = self.derived(x)
        if packed is not None:
            dtype, *arguments = packed
            return packed_stem(x.to(dtype), *arguments).to(x.dtype)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = conv(x)
            x = x if norm is None else norm(x.permute(NHWC)).permute(NCHW)
        return x

    def derive(self, x: Tensor) -> Any:
        convs: Any = self.convs
        dtype = policy.computed_in(x.dtype)
        odd = any(conv.in_channels % 2 for conv in convs[1:])  # which have no pairs
        if packed_stem.unavailable(x.device, dtype) or not policy.stem_by_kernel(odd, dtype):
            return None
        pairs: Any = list(zip(convs, self.norms, strict=True))
        activations = [(conv if norm is None else norm).activation for conv, norm in pairs]
        packed = dtype, *pack_layers(convs, dtype), activations
        if not any(norm is not None for _, norm in pairs):
            return packed
        none = x.new_empty(0, dtype=torch.float32)
        norms = [none if n is None else torch.stack((n.weight, n.bias)).float() for _, n in pairs]
        return *packed, norms, [0.0 if n is None else n.eps for _, n in pairs]


def join_stem(graph: OperatorGraph, operator: Operator) -> None:
    """At least two convolutions, each with a layer norm or without; the first reads the image."""
    if not _is_usual(operator) or operator.args[0] is not graph.source:
        return
    convs: list[Any] = [operator.function]
    norms: list[Any] = [None]
    last, is_nhwc = operator.result, False
    while (user := last.user) is not None:
        if _is_usual(user):
            convs, norms, last = [*convs, user.function], [*norms, None], user.result
            continue
        norm = user.result.user if permuted(user.results[0], NHWC) is last else None
        if norm is None or not isinstance(norm.function, FastLayerNorm):
            break
        if norms[-1] is not None or convs[-1].activation != "none":
            break
        norms[-1], last = norm.function, norm.result
        is_nhwc = last.user is None or permuted(last.user.results[0], NCHW) is not last
        if last.user is None or is_nhwc:
            break
        last = last.user.result
    if len(convs) < 2:
        return
    stem, made = Stem(convs, norms), last.producer
    assert made is not None
    if is_nhwc:
        batch, height, width, channels = last.shape
        shape = batch, channels, height, width
        graph.replace(
            made, _permute, graph.insert_before(made, stem, graph.source, shape=shape), NHWC
        )
    else:
        graph.replace(made, stem, graph.source)


def _is_usual(operator: Operator) -> bool:
    conv = operator.function
    if type(conv) is not FastConv2d or conv.groups != 1 or is_quantized(conv) or operator.kwargs:
        return False
    shape = conv.kernel_size, conv.stride, conv.padding, conv.dilation
    return shape == ((3, 3), (2, 2), (1, 1), (1, 1))
