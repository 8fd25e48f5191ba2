"""Global response norms between two linear layers, as in ConvNeXt V2.

The first layer also returns the sums of squares, and the second one scales its inputs, so that no
pass over the hidden map is left. https://arxiv.org/abs/2301.00808
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ops.inference.layers import FastLinear
from ops.rewriting.graph import Operator, OperatorGraph, Value
from ops.rewriting.layers import linear

__all__ = ["join_response_norm"]

_aten = torch.ops.aten


class ResponseFeedForward(nn.Module):
    """``fc2(response_norm(fc1(x))) + residual``, (B, H, W, dim) → (B, H, W, out_dim).

    The norm's bias is part of ``fc2``.
    """

    weight: Tensor

    def __init__(self, fc1: FastLinear, fc2: FastLinear, weight: Tensor, eps: float) -> None:
        super().__init__()
        self.fc1, self.fc2, self.eps = fc1, fc2, eps
        self.register_buffer("weight", weight.view(1, -1))

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        hidden, energy = self.fc1.energy(x)
        norm = energy.sqrt()
        share = norm / (norm.mean(dim=-1, keepdim=True) + self.eps)
        return self.fc2(hidden, residual, 1 + self.weight * share)


def join_response_norm(graph: OperatorGraph, operator: Operator) -> bool:
    """``linear(x + weight * x * n / (mean(n) + eps) + bias)``; ``n`` are norms of channels."""
    fc2 = operator.function
    if not isinstance(fc2, FastLinear) or "scale" in operator.kwargs:
        return False
    x = operator.args[0]
    moved = graph.made_by(x, _aten.permute.default)
    total = graph.made_by(x if moved is None else moved.args[0], _aten.add.Tensor)
    scaled = None if total is None else graph.made_by(total.args[1], _aten.addcmul.default)
    if total is None or scaled is None:
        return False
    hidden = total.args[0]
    product = graph.made_by(scaled.args[2], _aten.mul.Tensor)
    share = None if product is None else graph.made_by(product.args[1], _aten.div.Tensor)
    if product is None or share is None or product.args[0] is not hidden:
        return False
    norm, shifted = share.args[0], graph.made_by(share.args[1], _aten.add.Tensor)
    mean = None if shifted is None else graph.made_by(shifted.args[0], _aten.mean.dim)
    energy = graph.made_by(norm, _aten.linalg_vector_norm.default)
    if shifted is None or mean is None or energy is None or mean.args[0] is not norm:
        return False
    bias, weight, eps = scaled.args[0].constant, scaled.args[1].constant, shifted.args[1]
    if energy.args[0] is not hidden or bias is None or weight is None or scaled.kwargs:
        return False
    source = graph.made_by(hidden, _aten.permute.default)
    first = graph.made_by(hidden if source is None else source.args[0], FastLinear)
    axes = [1, 2] if source is None else [2, 3]
    channels = 3 if source is None else 1
    if first is None or first.kwargs or (source is None) != (moved is None):
        return False
    same_axes = sorted(a % 4 for a in energy.args[2]) == axes
    if not same_axes or [a % 4 for a in mean.args[1]] != [channels] or isinstance(eps, Value):
        return False
    if len(hidden.shape) != 4 or len(hidden.users) != 3 or len(norm.users) != 2:
        return False
    if any(
        graph.only_user(v) is None
        for v in (x, total.result, first.result)[: 2 + (source is not None)]
    ):
        return False
    layer: Any = fc2
    with torch.no_grad():
        shift = layer.weight @ bias.flatten()
        merged = linear(layer.weight, shift if layer.bias is None else layer.bias + shift)
    merged.activation, merged.clips_sum = layer.activation, layer.clips_sum
    made = ResponseFeedForward(first.function, merged, weight, eps)
    graph.replace(operator, made, *first.args, **operator.kwargs)
    graph.remove_unused()
    return True
