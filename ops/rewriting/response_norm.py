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
from ops.rewriting.graph import (
    NCHW,
    NHWC,
    Operator,
    OperatorGraph,
    Value,
    chain,
    is_available,
    permuted,
)
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


def join_response_norm(graph: OperatorGraph, operator: Operator) -> None:
    """``linear(response_norm(linear(x)))``."""
    fc2: Any = operator.function
    if not isinstance(fc2, FastLinear) or operator.kwargs.keys() - {"residual"}:
        return
    x = operator.args[0]
    moved = permuted(x, NHWC)
    norm = _norm(x if moved is None else moved)
    if norm is None or not x.once or (moved is not None and not moved.once):
        return
    source = permuted(norm.share.x, NCHW)
    if (source is None) != (moved is None) or norm.share.channels != (3 if source is None else 1):
        return
    match norm.share.x if source is None else source:
        case Value(FastLinear() as fc1, producer=first, once=once) if once or source is None:
            args, kwargs = first.args, {**first.kwargs, **operator.kwargs}
        case _:
            return
    if first.kwargs.keys() - {"scale"}:
        return
    if norm.bias is not None:
        with torch.no_grad():
            weight = multiplied_weight(fc2.weight, fc2.quantization)
            shift = (weight @ norm.bias.flatten().to(weight.dtype)).to(fc2.weight.dtype)
            merged = linear(fc2.weight, shift if fc2.bias is None else fc2.bias + shift)
        merged.activation, merged.clips_sum = fc2.activation, fc2.clips_sum
        if fc2.quantization is not None:  # its inputs, without the norm's bias, have other ranges
            merged.quantization = Quantization(origins=(fc2.quantization,))
        fc2 = merged
    made = ResponseFeedForward(fc1, fc2, norm.weight, norm.share.eps)
    graph.replace(operator, made, *args, **kwargs)


def _norm(value: Value) -> _Norm | None:
    """The response norm that computes a map (B, H, W, C) or (B, C, H, W)."""
    bias: Any = None
    match value:  # x * (weight * share + 1), or x + addcmul(bias, weight, x * share)
        case Value(_aten.mul.Tensor, [x, Value(_aten.add.Tensor, [factor, 1])]):
            users = 2
        case Value(_aten.add.Tensor, [x, Value(_aten.addcmul.default, [bias, weight, factor])]):
            users = 3
        case _:
            return None
    match factor:
        case Value(_aten.mul.Tensor, [first, second]) if users == 2 or first is x:
            weight, share = first if users == 2 else weight, _share(second)
        case _:
            return None
    of_inputs, shift = constant_of(weight), constant_of(bias)
    if share is None or share.x is not x or (len(x.users), len(share.norm.users)) != (users, 2):
        return None
    if of_inputs is None or (shift is None) != (users == 2):
        return None
    return _Norm(share, of_inputs, shift)


def _share(value: Value) -> _Share | None:
    match value:
        case Value(
            _aten.div.Tensor, [norm, Value(_aten.add.Tensor, [mean, int() | float() as eps])]
        ):
            pass
        case _:
            return None
    match norm, mean:
        case (
            Value(_aten.linalg_vector_norm.default, [x, 2, [*axes], True]),
            Value(_aten.mean.dim, [y, [channels], True]),
        ) if y is norm and len(x.shape) == 4:
            if sorted(axis % 4 for axis in (*axes, channels)) == [1, 2, 3]:
                return _Share(x, norm, eps, channels % 4)
    return None


def join_response_scales(graph: OperatorGraph, operator: Operator) -> None:
    """``1 + weight * n / (mean(n) + eps)``, (B, C, 1, 1); ``n`` are the norms of an NCHW map.

    :func:`ops.rewriting.epilogues.apply_gates` multiplies inputs of linear layers by them.
    """
    match operator:
        case Operator(_aten.add.Tensor, [Value(_aten.mul.Tensor, [factor, ratio]), 1]):
            weight, share = constant_of(factor), _share(ratio)
        case _:
            return
    if weight is None or share is None or share.channels != 1:
        return
    x, result = share.x, operator.result
    if weight.numel() == x.shape[1] and is_available(response_scales, x.dtype):
        pixels = graph.insert_before(operator, _aten.permute.default, x, NHWC)
        given = pixels, Value.of_constant(weight.flatten().float()), share.eps
        scales = graph.insert_before(operator, response_scales, *given, shape=x.shape[:2])
        graph.replace(operator, _aten.reshape.default, scales, list(result.shape))


def join_squeeze(graph: OperatorGraph, operator: Operator) -> None:
    """A feed-forward with a response norm whose inputs are squeezed and excited."""
    whole, kwargs = operator.function, operator.kwargs
    if not isinstance(whole, ResponseFeedForward) or kwargs.keys() != {"scale", "residual"}:
        return
    kinds = _aten.flatten.using_ints, NCHW, FastLinear, FastLinear, NHWC, FastGlobalAvgPool2d
    match chain(kwargs["scale"], *kinds):
        case [_, _, excite, squeeze, _, pool] if not excite.kwargs and not squeeze.kwargs:
            first, second = squeeze.function, excite.function
        case _:
            return
    layers: tuple[Any, ...] = first, second, whole.fc1, whole.fc2
    if [layer.activation for layer in layers] != ["relu", "sigmoid", "gelu", "none"]:
        return
    x, same_size = operator.args[0], whole.fc2.out_features == whole.fc1.in_features
    if permuted(x, NHWC) is pool.args[0] and same_size:
        made = SqueezedResponseFeedForward(first, second, whole)
        graph.replace(operator, made, x, residual=kwargs["residual"])
