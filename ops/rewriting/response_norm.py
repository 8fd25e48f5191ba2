"""Global response norms between two linear layers, as in ConvNeXt V2.

The first layer also returns the sums of squares, and the second one scales its inputs, so that no
pass over the hidden map is left. https://arxiv.org/abs/2301.00808
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ops.cpu import policy
from ops.cpu.feed_forward.response_mlp import PackedResponseMlp, response_mlp
from ops.cpu.norm.norms import response_scales
from ops.inference.layers import FastLayer, FastLinear, is_quantized
from ops.inference.packed_linear import Quantization, multiplied_weight
from ops.rewriting.graph import NCHW, NHWC, Operator, OperatorGraph, Value, is_available
from ops.rewriting.lift import FastGlobalAvgPool2d, constant_of, linear

__all__ = ["ResponseFeedForward", "join_response_norm", "join_response_scales", "join_squeeze"]

_aten = torch.ops.aten


class ResponseFeedForward(nn.Module):
    """``fc2(response_norm(fc1(x * scale))) + residual``, (B, H, W, dim) → (B, H, W, out_dim).

    ``scale`` is (B, dim). The norm's bias is part of ``fc2``.
    """

    weight: Tensor

    def __init__(self, fc1: FastLinear, fc2: FastLinear, weight: Tensor, eps: float) -> None:
        super().__init__()
        self.fc1, self.fc2, self.eps = fc1, fc2, eps
        self.register_buffer("weight", weight.view(1, -1))

    def extra_repr(self) -> str:
        return f"eps={self.eps}"

    def forward(
        self, x: Tensor, residual: Tensor | None = None, scale: Tensor | None = None
    ) -> Tensor:
        hidden, energy = self.fc1.energy(x, scale)
        norm = energy.sqrt()
        share = norm / (norm.mean(dim=-1, keepdim=True) + self.eps)
        return self.fc2(hidden, residual, 1 + self.weight * share)


class SqueezedResponseFeedForward(FastLayer):
    """The same after squeeze-and-excitation of ``x``, in one pass if there is a kernel."""

    kernels: ClassVar = (response_mlp,)

    def __init__(self, squeeze: FastLinear, excite: FastLinear, whole: ResponseFeedForward) -> None:
        super().__init__()
        self.squeeze, self.excite, self.whole = squeeze, excite, whole

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        packed = self.derived(x)
        if packed is not None:
            out: Tensor = packed(x, residual)
            return out
        means = x.flatten(1, 2).mean(1)
        return self.whole(x, residual, self.excite(self.squeeze(means)))

    def derive(self, x: Tensor) -> PackedResponseMlp:
        fc1, fc2 = self.whole.fc1, self.whole.fc2
        in_int8: list[Any] = [None, None]
        if is_quantized(fc1, fc2) and policy.response_mlp_in_int8(fc1.in_features):
            in_int8 = [layer.for_int8(x) for layer in (fc1, fc2)]
        response = self.whole.weight, self.whole.eps
        return PackedResponseMlp(self.squeeze, self.excite, fc1, fc2, *response, in_int8)


class _Share(NamedTuple):
    """``n / (mean(n) + eps)``, where ``n`` are the norms of the channels of a map ``x``."""

    x: Value
    norm: Value
    eps: float
    channels: int  # their axis


class _Norm(NamedTuple):
    """``x * (1 + weight * share) + bias`` with a share of ``x``."""

    share: _Share
    weight: Tensor
    bias: Tensor | None


def join_response_norm(graph: OperatorGraph, operator: Operator) -> bool:
    """``linear(response_norm(linear(x)))``."""
    fc2: Any = operator.function
    if not isinstance(fc2, FastLinear) or operator.kwargs.keys() - {"residual"}:
        return False
    x = operator.args[0]
    moved = graph.permuted(x, NHWC)
    normed = x if moved is None else moved.args[0]
    norm = _norm(graph, normed)
    if norm is None or any(graph.only_user(value) is None for value in (x, normed)):
        return False
    source = graph.permuted(norm.share.x, NCHW)
    if (source is None) != (moved is None) or norm.share.channels != (3 if source is None else 1):
        return False
    first = graph.made_by(norm.share.x if source is None else source.args[0], FastLinear)
    if first is None or first.kwargs.keys() - {"scale"}:
        return False
    if source is not None and graph.only_user(first.result) is not source:
        return False
    if norm.bias is not None:
        with torch.no_grad():
            weight = multiplied_weight(fc2.weight, fc2.quantization)
            shift = (weight @ norm.bias.flatten().to(weight.dtype)).to(fc2.weight.dtype)
            merged = linear(fc2.weight, shift if fc2.bias is None else fc2.bias + shift)
        merged.activation, merged.clips_sum = fc2.activation, fc2.clips_sum
        if fc2.quantization is not None:  # its inputs, without the norm's bias, have other ranges
            merged.quantization = Quantization(origins=(fc2.quantization,))
        fc2 = merged
    made = ResponseFeedForward(first.function, fc2, norm.weight, norm.share.eps)
    graph.replace(operator, made, *first.args, **first.kwargs, **operator.kwargs)
    graph.remove_unused()
    return True


def _norm(graph: OperatorGraph, value: Value) -> _Norm | None:
    """The response norm that computes a map (B, H, W, C) or (B, C, H, W)."""
    total = graph.made_by(value, _aten.add.Tensor)
    scaled = None if total is None else graph.made_by(total.args[1], _aten.addcmul.default)
    whole = graph.made_by(value, _aten.mul.Tensor)
    if total is not None and scaled is not None and not scaled.kwargs:  # x + addcmul(b, w, x * s)
        x, bias, weight = total.args[0], scaled.args[0].constant, scaled.args[1].constant
        product = graph.made_by(scaled.args[2], _aten.mul.Tensor)
        if product is None or product.args[0] is not x or bias is None:
            return None
        share, users = product.args[1], 3
    elif whole is not None:  # x * (w * s + 1)
        x, bias = whole.args[0], None
        shifted = graph.made_by(whole.args[1], _aten.add.Tensor)
        product = None if shifted is None else graph.made_by(shifted.args[0], _aten.mul.Tensor)
        if shifted is None or product is None or shifted.args[1] != 1:
            return None
        weight, share, users = constant_of(product.args[0]), product.args[1], 2
    else:
        return None
    found = _share(graph, share)
    if found is None or weight is None or found.x is not x:
        return None
    if len(x.users) != users or len(found.norm.users) != 2:
        return None
    return _Norm(found, weight, bias)


def _share(graph: OperatorGraph, value: Value) -> _Share | None:
    ratio = graph.made_by(value, _aten.div.Tensor)
    lowered = ratio and graph.made_by(ratio.args[1], _aten.add.Tensor)
    mean = lowered and graph.made_by(lowered.args[0], _aten.mean.dim)
    energy = ratio and graph.made_by(ratio.args[0], _aten.linalg_vector_norm.default)
    if not ratio or not lowered or not mean or not energy or mean.args[0] is not ratio.args[0]:
        return None
    x, eps = energy.args[0], lowered.args[1]
    if energy.args[1:2] != [2] or energy.args[3:] != [True] or energy.kwargs:
        return None
    if mean.args[2:] != [True] or mean.kwargs or isinstance(eps, Value) or len(x.shape) != 4:
        return None
    axes, (channels, *others) = energy.args[2], mean.args[1] or [0]
    if others or sorted(axis % 4 for axis in (*(axes or ()), channels)) != [1, 2, 3]:
        return None
    return _Share(x, ratio.args[0], eps, channels % 4)


def join_response_scales(graph: OperatorGraph, operator: Operator) -> bool:
    """``1 + weight * n / (mean(n) + eps)``, (B, C, 1, 1); ``n`` are the norms of an NCHW map.

    :func:`ops.rewriting.epilogues.apply_gates` multiplies inputs of linear layers by them.
    """
    if operator.function is not _aten.add.Tensor or operator.kwargs or operator.args[1] != 1:
        return False
    product = graph.made_by(operator.args[0], _aten.mul.Tensor)
    weight = None if product is None else constant_of(product.args[0])
    share = None if product is None else _share(graph, product.args[1])
    if weight is None or share is None or share.channels != 1:
        return False
    x, result = share.x, operator.result
    if weight.numel() != x.shape[1] or not is_available(response_scales, x.dtype):
        return False
    pixels = graph.insert_before(operator, _aten.permute.default, x, NHWC)
    given = pixels, Value.of_constant(weight.flatten().float()), share.eps
    scales = graph.insert_before(operator, response_scales, *given, shape=x.shape[:2])
    graph.replace(operator, _aten.reshape.default, scales, list(result.shape))
    graph.remove_unused()
    return True


def join_squeeze(graph: OperatorGraph, operator: Operator) -> bool:
    """A feed-forward with a response norm whose inputs are squeezed and excited."""
    whole = operator.function
    if not isinstance(whole, ResponseFeedForward):
        return False
    if operator.kwargs.keys() != {"scale", "residual"}:
        return False
    flat = graph.made_by(operator.kwargs["scale"], _aten.flatten.using_ints)
    gates = flat and graph.permuted(flat.args[0], NCHW)
    excite = gates and graph.made_by(gates.args[0], FastLinear)
    squeeze = excite and graph.made_by(excite.args[0], FastLinear)
    pixels = squeeze and graph.permuted(squeeze.args[0], NHWC)
    means = pixels and graph.made_by(pixels.args[0], FastGlobalAvgPool2d)
    x = graph.permuted(operator.args[0], NHWC)
    if excite is None or squeeze is None or means is None or x is None:
        return False
    layers: tuple[Any, ...] = squeeze.function, excite.function, whole.fc1, whole.fc2
    if [layer.activation for layer in layers] != ["relu", "sigmoid", "gelu", "none"]:
        return False
    same = means.args[0] is x.args[0] and whole.fc2.out_features == whole.fc1.in_features
    if not same or squeeze.kwargs or excite.kwargs:
        return False
    made = SqueezedResponseFeedForward(squeeze.function, excite.function, whole)
    graph.replace(operator, made, operator.args[0], residual=operator.kwargs["residual"])
    graph.remove_unused()
    return True
