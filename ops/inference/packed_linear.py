"""Linear layers with packed weights, by our kernel or oneDNN, whichever is faster.

oneDNN is called through the private functions that torch's compiler uses, see
:func:`ops.inference.layers.has_onednn`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ops.cpu import policy
from ops.cpu.activations import activation_of
from ops.cpu.gemm.int8 import int8_unavailable, pack_int8_weight, quantize_weight
from ops.cpu.gemm.linear import pack_weight, packed_linear, packed_linear_energy
from ops.cpu.gemm.mlp import packed_mlp

__all__ = [
    "PackedLinear",
    "PackedWeight",
    "Quantization",
    "by_onednn",
    "multiplied_weight",
    "packed_pair",
    "quantization_of",
    "scaled",
    "scaled_residual",
]


def by_onednn(function: Callable[..., Tensor], activation: str, *arguments: Any) -> Tensor:
    """Call a function of oneDNN with an activation, which torch applies if oneDNN doesn't."""
    plain, _, onednn = activation_of(activation)
    if onednn is not None:
        return function(*arguments, *onednn)
    out = function(*arguments, "none", [], "")
    return out.relu_() if activation == "relu" else plain(out)


@dataclass(eq=False)
class Quantization:
    """How a layer computes in int8. Layers made from it, such as folded ones, share the object.

    Attributes:
        in_range: the scale and the zero of its inputs, of a calibration; None if each row of inputs
            has its own, see :func:`ops.cpu.gemm.int8.quantize_rows`.
        origins: those of the layers that this one was made from, if it has not theirs.
        is_used: whether a kernel has computed the layer, or one made from it, in int8.
    """

    in_range: tuple[float, float] | None = None
    origins: tuple[Quantization, ...] = ()
    is_used: bool = False

    def applies(self, weight: Tensor) -> bool:
        """Whether a layer with this weight computes in int8 on this CPU."""
        has_products = int8_unavailable(weight.device, weight.dtype) is None
        return policy.linear_in_int8(has_products, weight.dtype)

    def pack(self, weight: Tensor, bias: Tensor | None) -> PackedWeight:
        """The arguments of a kernel in int8 that is about to compute the layer."""
        for one in (self, *self.origins):
            one.is_used = True
        wide = weight.new_zeros(len(weight), dtype=torch.float32) if bias is None else bias.float()
        in_range = None if self.in_range is None else wide.new_tensor(self.in_range)
        return PackedWeight(*pack_int8_weight(weight), wide, in_range)


def quantization_of(module: nn.Module) -> Quantization | None:
    """How a layer, be it plain or an inference form, computes in int8; None if it does not."""
    found = vars(module).get("quantization")
    return found if isinstance(found, Quantization) else None


def multiplied_weight(weight: Tensor, quantization: Quantization | None) -> Tensor:
    """A layer's weight; if it computes in int8, dequantised to float32."""
    if quantization is None:
        return weight
    quantized, scale = quantize_weight(weight.flatten(1))
    return (quantized * scale[:, None]).view(weight.shape)


class PackedWeight(NamedTuple):
    """The arguments of a kernel for a layer; ``weight_scale`` and ``in_range`` in int8 only."""

    weight: Tensor
    weight_scale: Tensor | None
    bias: Tensor
    in_range: Tensor | None = None


class PackedLinear:
    """A linear layer whose weight is packed for our kernel, for oneDNN, or for both.

    The choice depends on the number of rows; weights are packed on first use.

    Args:
        weight: (out_features, in_features).
        bias: (out_features,) or None.
        quantization: compute in int8, where the CPU can; by default, in the weight's dtype.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None, quantization: Quantization | None = None
    ) -> None:
        self._weight = weight.detach().contiguous()
        self._bias = None if bias is None else bias.detach()
        self._has_kernel = packed_linear.unavailable(weight.device, weight.dtype) is None
        self._for_kernel: PackedWeight | None = None
        self._for_onednn: Tensor | None = None
        applies = quantization is not None and quantization.applies(weight)
        self._quantization = quantization if applies else None

    def __call__(
        self,
        x: Tensor,
        activation: str = "none",
        residual: Tensor | None = None,
        scale: Tensor | None = None,
        residual_scale: Tensor | None = None,
        factor: Tensor | None = None,
        clips_sum: bool = False,
    ) -> Tensor:
        """``activation(linear(x * scale)) + residual * residual_scale``, or times ``factor``.

        With ``clips_sum``, ReLU or ReLU6 is applied after the residual is added.

        (B, ..., in_features) → (B, ..., out_features); ``scale`` is (B, in_features), and
        ``residual_scale``, if there is a residual, (out_features,) in float32.
        """
        if self._is_by_kernel(x) and (scale is not None or residual_scale is not None):
            packed: PackedWeight | None = self.packed()
        else:
            packed = self.packed_for(x, activation, has_factor=factor is not None)
        if packed is not None:
            weight, weight_scale, bias, in_range = packed
            if factor is not None:
                combined: tuple[Tensor | None, str] = factor, "multiply"
            elif residual is None:
                combined, residual_scale = (None, "none"), None
            elif clips_sum:
                combined = residual, "add_clipped"
            else:
                combined = residual, "add" if residual_scale is None else "add_scaled"
            scales = scale, residual_scale, weight_scale, in_range
            out: Tensor = packed_linear(x, weight, bias, activation, *combined, *scales)
            return out
        x, residual = scaled(x, scale), scaled_residual(residual, residual_scale)
        if clips_sum:
            return activation_of(activation).plain(self._by_onednn(x, "none", residual))
        out = self._by_onednn(x, activation, residual)
        return out if factor is None else out.mul_(factor)

    def _is_by_kernel(self, x: Tensor) -> bool:
        """Whether our kernel computes the layer for ``x``."""
        return (self.is_int8 or self._has_kernel) and x.ndim > 1

    def packed_for(
        self, x: Tensor, activation: str, has_factor: bool = False
    ) -> PackedWeight | None:
        """Packed weight and bias for our kernel, if it is faster for inputs like ``x``."""
        if not self._is_by_kernel(x):
            return None
        rows = x.numel() // max(1, x.shape[-1])
        features = self._weight.shape[1], self._weight.shape[0]
        own = self.is_int8 or policy.linear_by_kernel(
            rows, *features, x.dtype, activation, has_factor
        )
        return self.packed() if own else None

    @property
    def is_int8(self) -> bool:
        """Whether it computes in int8."""
        return self._quantization is not None

    def packed(self) -> PackedWeight:
        """The layer's weights for our kernels, packed on first use."""
        if self._for_kernel is None:
            bias = self._bias
            if self._quantization is not None:
                self._for_kernel = self._quantization.pack(self._weight, bias)
            else:
                bias = self._weight.new_zeros(len(self._weight)) if bias is None else bias
                self._for_kernel = PackedWeight(pack_weight(self._weight), None, bias.float())
        return self._for_kernel

    def _by_onednn(self, x: Tensor, activation: str, residual: Tensor | None) -> Tensor:
        if self._for_onednn is None:
            rows = max(1, x.numel() // max(1, x.shape[-1]))
            weight = self._weight.to(policy.computed_in(x.dtype))
            self._for_onednn = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
        bias = None if self._bias is None else self._bias.to(self._for_onednn.dtype)
        return _onednn_linear(x, self._for_onednn, bias, activation, residual)

    def energy(
        self, x: Tensor, activation: str, scale: Tensor | None
    ) -> tuple[Tensor, Tensor] | None:
        """The layer's output and the sums of its squares; None if our kernel is unavailable."""
        if not self._is_by_kernel(x):
            return None
        weight, weight_scale, bias, in_range = self.packed()
        both = packed_linear_energy(x, weight, bias, activation, scale, weight_scale, in_range)
        return both[0], both[1]


def packed_pair(
    first: Any, second: Any, x: Tensor, activation: str, residual: Tensor | None
) -> Tensor | None:
    """``second(activation(first(x))) + residual`` in one pass; None if each layer needs its own.

    Args:
        first, second: :class:`PackedLinear`; others have no such pass.
        x: (B, ..., in_features).
        residual: (B, ..., out_features).
    """
    if not isinstance(first, PackedLinear) or not isinstance(second, PackedLinear) or x.ndim < 2:
        return None
    if first.is_int8 != second.is_int8:
        return None
    packed = first.packed_for(x, activation), second.packed_for(x, "none")
    if packed[0] is None or packed[1] is None:
        return None
    weight1, scale1, bias1, range1 = packed[0]
    weight2, scale2, bias2, range2 = packed[1]
    layers = weight1, bias1, weight2, bias2, activation, residual
    out: Tensor = packed_mlp(x, *layers, scale1, scale2, range1, range2)
    return out


def scaled(x: Tensor, scale: Tensor | None) -> Tensor:
    """(B, …, C) times (B, C)."""
    return x if scale is None else x * scale.view(len(scale), *[1] * (x.ndim - 2), x.shape[-1])


def scaled_residual(residual: Tensor | None, scale: Tensor | None) -> Tensor | None:
    """(B, …, C) times float32 (C,)."""
    return residual if residual is None or scale is None else residual * scale.to(residual.dtype)


def _onednn_linear(
    x: Tensor, packed: Tensor, bias: Tensor | None, activation: str, residual: Tensor | None
) -> Tensor:
    linear = torch.ops.mkldnn._linear_pointwise
    if x.dtype != packed.dtype:
        wide = None if residual is None else residual.to(packed.dtype)
        return _onednn_linear(x.to(packed.dtype), packed, bias, activation, wide).to(x.dtype)
    if residual is None:
        return by_onednn(linear.default, activation, x, packed, bias)
    if activation == "none" and residual.is_contiguous():
        return linear.binary(x, residual, packed, bias, "add")
    return by_onednn(linear.default, activation, x, packed, bias).add_(residual)
