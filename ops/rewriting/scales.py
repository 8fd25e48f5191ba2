"""Scales of channels: a response norm's take one pass, and a shortcut's none.

:func:`ops.rewriting.epilogues.apply_gates` multiplies inputs of linear layers by the former.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ops.cpu.call.dispatch import kernels_apply
from ops.cpu.norm.response_scales import response_scales
from ops.inference.layers import FastLinear
from ops.rewriting.graph import NHWC, Operator, OperatorGraph, Value
from ops.rewriting.layers import linear

__all__ = ["join_response_scales", "scale_shortcut"]

_aten = torch.ops.aten


class ResponseScales(nn.Module):
    """``1 + weight * n / (mean(n) + eps)`` for the norm n of each channel.

    (B, H, W, dim) → (B, dim). https://arxiv.org/abs/2301.00808
    """

    weight: Tensor

    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.register_buffer("weight", weight.flatten().float())

    def extra_repr(self) -> str:
        return f"eps={self.eps}"

    def forward(self, x: Tensor) -> Tensor:
        if kernels_apply((x,)) and response_scales.unavailable(x.device, x.dtype) is None:
            out: Tensor = response_scales(x, self.weight, self.eps)
            return out
        norm = x.float().flatten(1, 2).norm(dim=1)
        share = norm / (norm.mean(dim=-1, keepdim=True) + self.eps)
        return (1 + self.weight * share).to(x.dtype)


def join_response_scales(graph: OperatorGraph, operator: Operator) -> bool:
    """``1 + weight * n / (mean(n) + eps)``, (B, C, 1, 1); ``n`` are the norms of an NCHW map."""
    if operator.function is not _aten.add.Tensor or operator.kwargs:
        return False
    product = graph.made_by(operator.args[0], _aten.mul.Tensor)
    if product is None or not isinstance(product.args[0], Value):
        return False
    weight, share = product.args[0].constant, graph.made_by(product.args[1], _aten.div.Tensor)
    if operator.args[1] != 1 or weight is None or share is None:
        return False
    norm, shifted = share.args[0], graph.made_by(share.args[1], _aten.add.Tensor)
    mean = None if shifted is None else graph.made_by(shifted.args[0], _aten.mean.dim)
    energy = graph.made_by(norm, _aten.linalg_vector_norm.default)
    if shifted is None or mean is None or energy is None or mean.args[0] is not norm:
        return False
    x, eps, result = energy.args[0], shifted.args[1], operator.result
    of_pixels = len(x.shape) == 4 and list(energy.args[1:]) == [2, [2, 3], True]
    of_channels = list(mean.args[1:]) == [[1], True] and weight.numel() == x.shape[1]
    if not of_pixels or not of_channels or isinstance(eps, Value) or mean.kwargs or energy.kwargs:
        return False
    pixels = graph.insert_before(operator, _aten.permute.default, x, NHWC)
    scales = graph.insert_before(operator, ResponseScales(weight, eps), pixels, shape=x.shape[:2])
    graph.replace(operator, _aten.reshape.default, scales, list(result.shape))
    graph.remove_unused()
    return True


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
    vectors = [_vector(value, axis, shortcut) for value in (shift, scale)]
    if vectors[0] is None or vectors[1] is None or shortcut.constant is not None:
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


def _vector(value: Value, axis: int, beside: Value) -> Tensor | None:
    """The numbers of the channels, if a constant has one for each of them."""
    constant, channels = value.constant, beside.shape[axis]
    if constant is None or constant.numel() != channels or value.dtype != beside.dtype:
        return None
    aligned = [1] * (len(beside.shape) - constant.ndim) + list(constant.shape)
    return constant.flatten() if aligned[axis] == channels else None
