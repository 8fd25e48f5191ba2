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
from ops.cpu.call.binding import unseen
from ops.cpu.gemm.int8 import int8_unavailable, pack_int8_weight, quantize_weight
from ops.cpu.gemm.linear import pack_weight, packed_linear
from ops.cpu.gemm.mlp import packed_mlp

__all__ = [
    "PackedLinear",
    "PackedWeight",
    "Quantization",
    "by_onednn",
    "multiplied_weight",
    "packed_pair",
    "quantization_of",
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
    """The weight of a linear layer packed for our kernel, for oneDNN, or for both, on first use.

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
        applies = quantization is not None and quantization.applies(weight)
        self._quantization = quantization if applies else None
        no_kernel = packed_linear.unavailable(weight.device, weight.dtype) is not None
        self._has_kernel = applies or not no_kernel
        self._for_kernel: PackedWeight | None = None
        self._for_onednn: Tensor | None = None

    @property
    def is_int8(self) -> bool:
        """Whether the layer computes in int8."""
        return self._quantization is not None

    def packed_for(
        self, x: Tensor, activation: str, *, is_scaled: bool = False, has_factor: bool = False
    ) -> PackedWeight | None:
        """The weight for our kernel, if it computes the layer for inputs like ``x``.

        Which it does if it is faster, in int8, and for scaled inputs and residuals.
        """
        if not self._has_kernel or x.ndim < 2:
            return None
        rows = x.numel() // max(1, x.shape[-1])
        features = self._weight.shape[1], self._weight.shape[0]
        own = is_scaled or self.is_int8
        own = own or policy.linear_by_kernel(rows, *features, x.dtype, activation, has_factor)
        return self.packed() if own else None

    def packed(self) -> PackedWeight:
        """The weight for our kernels."""
        if self._for_kernel is None:
            self._for_kernel = self._pack()
        return self._for_kernel

    @unseen()
    def _pack(self) -> PackedWeight:
        bias = self._bias
        if self._quantization is not None:
            return self._quantization.pack(self._weight, bias)
        bias = self._weight.new_zeros(len(self._weight)) if bias is None else bias
        return PackedWeight(pack_weight(self._weight), None, bias.float())

    def by_onednn(self, x: Tensor, activation: str, residual: Tensor | None) -> Tensor:
        """``activation(linear(x)) + residual``, in the dtype that oneDNN computes."""
        if self._for_onednn is None:
            rows = max(1, x.numel() // max(1, x.shape[-1]))
            with unseen():
                weight = self._weight.to(policy.computed_in(x.dtype))
                self._for_onednn = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
        dtype = self._for_onednn.dtype
        given = x.to(dtype), self._for_onednn, None if self._bias is None else self._bias.to(dtype)
        linear = torch.ops.mkldnn._linear_pointwise
        residual = None if residual is None else residual.to(dtype)
        if residual is not None and activation == "none" and residual.is_contiguous():
            out: Tensor = linear.binary(given[0], residual, *given[1:], "add")
        else:
            out = by_onednn(linear.default, activation, *given)
            out = out if residual is None else out.add_(residual)
        return out.to(x.dtype)


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
