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
    is_available,
    permuted,
)
from ops.rewriting.lift import FastAdaptiveAvgPool2d, constant_of, linear

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
    eps: float
    channels: int  # their axis


def join_response_norm(graph: OperatorGraph, operator: Operator) -> None:
    """``linear(response_norm(linear(x)))``."""
    fc2: Any = operator.function
    if not isinstance(fc2, FastLinear) or operator.kwargs.keys() - {"residual"}:
        return
    bias: Any = None
    moved = permuted(operator.args[0], NHWC)
    match operator.args[0] if moved is None else moved:
        case Value(
            _aten.mul.Tensor,
            [hidden, Value(_aten.add.Tensor, [Value(_aten.mul.Tensor, [factor, ratio]), 1])],
        ):
            pass
        case Value(
            _aten.add.Tensor,
            [
                hidden,
                Value(_aten.addcmul.default, [bias, factor, Value(_aten.mul.Tensor, [x, ratio])]),
            ],
        ) if x is hidden:
            pass
        case _:
            return
    match hidden if moved is None else permuted(hidden, NCHW):
        case Value(FastLinear() as fc1, producer=first) if not first.kwargs.keys() - {"scale"}:
            share, weight, shift = _share(ratio), constant_of(factor), constant_of(bias)
        case _:
            return
    if share is None or share.x is not hidden or weight is None:
        return
    if share.channels != (3 if moved is None else 1):
        return
    if shift is not None:
        with torch.no_grad():
            inner = multiplied_weight(fc2.weight, fc2.quantization)
            shift = (inner @ shift.flatten().to(inner.dtype)).to(fc2.weight.dtype)
            merged = linear(fc2.weight, shift if fc2.bias is None else fc2.bias + shift)
        merged.activation, merged.clips_sum = fc2.activation, fc2.clips_sum
        if fc2.quantization is not None:  # its inputs, without the norm's bias, have other ranges
            merged.quantization = Quantization(origins=(fc2.quantization,))
        fc2 = merged
    elif bias is not None:
        return
    made = ResponseFeedForward(fc1, fc2, weight, share.eps)
    graph.replace(operator, made, *first.args, **first.kwargs, **operator.kwargs)


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
                return _Share(x, eps, channels % 4)
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
    match kwargs["scale"]:
        case Value(_aten.flatten.using_ints, [gates, 1]):
            pass
        case _:
            return
    match permuted(gates, NCHW):
        case Value(
            FastLinear(activation="sigmoid") as excite,
            [Value(FastLinear(activation="relu") as squeeze, [means])],
        ):
            pass
        case _:
            return
    layers = whole.fc1, whole.fc2
    x, same_size = operator.args[0], whole.fc2.out_features == whole.fc1.in_features
    if [layer.activation for layer in layers] != ["gelu", "none"] or not same_size:
        return
    match permuted(means, NHWC):
        case Value(FastAdaptiveAvgPool2d(output_size=(1, 1)), [map_]) if map_ is permuted(x, NHWC):
            made = SqueezedResponseFeedForward(squeeze, excite, whole)
            graph.replace(operator, made, x, residual=kwargs["residual"])
