"""Linear layers with packed weights, by our kernel or by oneDNN, whichever is the faster one.

The calls to oneDNN are the ones that torch's own compiler makes; they are private, see
:func:`ops.inference.layers.has_onednn`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor

from ops import linear as native_linear
from ops import native
from ops.native.eager import Repeats

__all__ = [
    "ONEDNN",
    "PackedLinear",
    "by_tiles",
    "computed_in",
    "few_rows",
    "scaled",
    "scaled_residual",
]

# Names of ops.depthwise.ACTIVATIONS → (attribute, scalars, algorithm) of oneDNN's.
ONEDNN: dict[str, tuple[str, list[float | None], str]] = {
    "none": ("none", [], ""),
    "relu": ("relu", [], ""),
    "gelu": ("gelu", [], "none"),
    "silu": ("swish", [], ""),
    "hardswish": ("hardswish", [], ""),
}
# Up to this many rows our linear kernel, which fetches weights ahead, is the faster one on such
# CPUs, up to fewer where bfloat16 is multiplied in tiles; on others it is with any number.
_FEW_ROWS = {"amx": 2048, "portable": 2048}
_FEW_ROWS_OF_TILES = 512
# And from so few features, or to so few, with any number of rows.
_NARROW = 32


def computed_in(dtype: torch.dtype) -> torch.dtype:
    """What oneDNN is to multiply: float32 for what the CPU does not multiply."""
    return dtype if native.multiplies(dtype) else torch.float32


def by_tiles(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies ``dtype`` in tiles, which not all of our kernels do."""
    return dtype == torch.bfloat16 and native.instruction_set() == "amx"


def few_rows(dtype: torch.dtype) -> int:
    """Up to how many rows our linear kernel is faster than oneDNN's."""
    if by_tiles(dtype):
        return _FEW_ROWS_OF_TILES
    return _FEW_ROWS.get(native.instruction_set(), sys.maxsize)


class PackedLinear:
    """A linear layer whose weight is packed for our kernel, for oneDNN, or for both.

    Which of them runs depends on the number of rows; a packed weight is made when it is first used.

    Args:
        weight: (out_features, in_features).
        bias: (out_features,) or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight = weight.detach().contiguous()
        self._bias = None if bias is None else bias.detach()
        self._has_kernel = (
            native_linear.unsupported(weight.device, weight.dtype, with_bfloat16=True) is None
        )
        suits_onednn = native.multiplies(weight.dtype)
        self._few_rows = few_rows(weight.dtype) if suits_onednn else sys.maxsize
        self._for_kernel: tuple[Tensor, Tensor] | None = None
        self._for_onednn: Tensor | None = None
        self._repeats = Repeats(self._prepare)

    def __call__(
        self,
        x: Tensor,
        activation: str,
        residual: Tensor | None,
        scale: Tensor | None = None,
        residual_scale: Tensor | None = None,
    ) -> Tensor:
        """``activation(linear(x * scale)) + residual * residual_scale``.

        (B, ..., in_features) → (B, ..., out_features); ``scale`` is (B, in_features), and
        ``residual_scale``, if there is a residual, (out_features,) in float32.
        """
        if scale is not None or residual_scale is not None:
            return self._with_scales(x, activation, residual, scale, residual_scale)
        way = self._repeats.find((x, residual), activation)
        return (way or self._way(x, activation))(x, residual)

    def packed_for(self, x: Tensor, activation: str) -> tuple[Tensor, Tensor] | None:
        """What our kernel wants of weight and bias, if it is the faster one for such ``x``."""
        rows = x.numel() // max(1, x.shape[-1])
        own = rows <= self._few_rows or min(self._weight.shape) <= _NARROW
        own |= activation == "gelu" and x.dtype == torch.bfloat16
        return self._packed() if self._has_kernel and own and x.ndim > 1 else None

    def _prepare(
        self, x: Tensor, residual: Tensor | None, activation: str
    ) -> Callable[[Tensor, Tensor | None], Tensor]:
        packed, way = self.packed_for(x, activation), None
        if packed is not None:
            combination = "none" if residual is None else "add"
            way = native_linear.prepare(x, *packed, activation, residual, combination)
        return way or self._way(x, activation)

    def _way(self, x: Tensor, activation: str) -> Callable[[Tensor, Tensor | None], Tensor]:
        """What computes the layer for any tensors with as many rows as ``x``."""
        packed = self.packed_for(x, activation)
        if packed is not None:
            return lambda x, other: native_linear.packed_linear(
                x, *packed, activation, other, "none" if other is None else "add"
            )
        if self._for_onednn is None:
            rows = max(1, x.numel() // max(1, x.shape[-1]))
            weight = self._weight.to(computed_in(x.dtype))
            self._for_onednn = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
        matrix = self._for_onednn
        bias = None if self._bias is None else self._bias.to(matrix.dtype)
        return lambda x, other: _onednn_linear(x, matrix, bias, activation, other)

    def energy(
        self, x: Tensor, activation: str, scale: Tensor | None
    ) -> tuple[Tensor, Tensor] | None:
        """The layer and the sums of its squares; None where our kernel cannot be had."""
        if not self._has_kernel:
            return None
        return native_linear.packed_linear_energy(x, *self._packed(), activation, scale)

    def _with_scales(
        self,
        x: Tensor,
        activation: str,
        residual: Tensor | None,
        scale: Tensor | None,
        residual_scale: Tensor | None,
    ) -> Tensor:
        if residual is None:
            residual_scale = None
        if not self._has_kernel:  # without which each takes a pass of its own
            x, residual = scaled(x, scale), scaled_residual(residual, residual_scale)
            return self(x, activation, residual)
        added = "add" if residual_scale is None else "add_scaled"
        combination = "none" if residual is None else added
        return native_linear.packed_linear(
            x, *self._packed(), activation, residual, combination, scale, residual_scale
        )

    def _packed(self) -> tuple[Tensor, Tensor]:
        if self._for_kernel is None:
            bias = self._bias
            if bias is None:
                bias = self._weight.new_zeros(len(self._weight))
            self._for_kernel = native_linear.pack_weight(self._weight), bias.float()
        return self._for_kernel


def scaled(x: Tensor, scale: Tensor | None) -> Tensor:
    """(B, …, C) times (B, C)."""
    return x if scale is None else x * scale.view(len(scale), *[1] * (x.ndim - 2), x.shape[-1])


def scaled_residual(residual: Tensor | None, scale: Tensor | None) -> Tensor | None:
    """(B, …, C) times (C,) of float32."""
    return residual if residual is None or scale is None else residual * scale.to(residual.dtype)


def _onednn_linear(
    x: Tensor, packed: Tensor, bias: Tensor | None, activation: str, residual: Tensor | None
) -> Tensor:
    linear = torch.ops.mkldnn._linear_pointwise
    if x.dtype != packed.dtype:
        wide = None if residual is None else residual.to(packed.dtype)
        return _onednn_linear(x.to(packed.dtype), packed, bias, activation, wide).to(x.dtype)
    if residual is None:
        return linear.default(x, packed, bias, *ONEDNN[activation])
    if activation == "none" and residual.is_contiguous():
        return linear.binary(x, residual, packed, bias, "add")
    return linear.default(x, packed, bias, *ONEDNN[activation]).add_(residual)
