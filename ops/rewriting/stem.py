"""Stems: an image's first convolutions, 3×3 of stride 2, run in one pass."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ops.cpu import policy
from ops.cpu.stem.packed_stem import pack_layers, packed_stem
from ops.inference.layers import FastConv2d, FastLayer, is_quantized
from ops.rewriting.graph import Operator, OperatorGraph

__all__ = ["Stem", "join_stem"]


class Stem(FastLayer):
    """Convolutions with their activations, see :func:`packed_stem`.

    (B, C, H, W) → (B, C', H', W').
    """

    def __init__(self, convs: list[Any]) -> None:
        super().__init__()
        self.convs = nn.Sequential(*convs)

    def forward(self, x: Tensor) -> Tensor:
        packed = self.derived(x)
        if packed is None:
            out: Tensor = self.convs(x)
            return out
        dtype, *arguments = packed
        return packed_stem(x.to(dtype), *arguments).to(x.dtype)

    def derive(self, x: Tensor) -> Any:
        convs: Any = self.convs
        dtype = policy.computed_in(x.dtype)
        odd = any(conv.in_channels % 2 for conv in convs[1:])  # which have no pairs
        if packed_stem.unavailable(x.device, dtype) or not policy.stem_by_kernel(odd, dtype):
            return None
        return dtype, *pack_layers(convs, dtype), [conv.activation for conv in convs]


def join_stem(graph: OperatorGraph, operator: Operator) -> None:
    """At least two convolutions, of which the first reads the image."""
    if not _is_usual(operator) or operator.args[0] not in graph.sources:
        return
    convs, last = [operator.function], operator
    while (user := last.result.user) is not None and _is_usual(user):
        convs, last = [*convs, user.function], user
    if len(convs) > 1:
        graph.replace(last, Stem(convs), operator.args[0])


def _is_usual(operator: Operator) -> bool:
    conv = operator.function
    if type(conv) is not FastConv2d or conv.groups != 1 or is_quantized(conv) or operator.kwargs:
        return False
    shape = conv.kernel_size, conv.stride, conv.padding, conv.dilation
    return shape == ((3, 3), (2, 2), (1, 1), (1, 1))
