"""Linear layers in int8 on the CPU for inference, with fused epilogues.

The kernel (``int8.h``) multiplies unsigned bytes of inputs by signed bytes of weights, with exact
sums in 32 bits. Weights have a scale for each output. Rows of inputs have scale and zero of their
own, found as they are quantised, or those of a calibration, which takes one pass less.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ops.cpu import policy
from ops.cpu.build import load, unavailable_reason
from ops.cpu.call.binding import kernel
from ops.cpu.call.c_arguments import Addresses, Call
from ops.cpu.call.dispatch import require_dtype
from ops.cpu.call.tensors import dense
from ops.cpu.gemm.problem import (
    TENSORS,
    check_scales,
    linear_problem,
    output_shape,
    packed_size,
    with_rows,
)

__all__ = [
    "LARGEST_BYTE",
    "LARGEST_INPUT",
    "LEAST_STEP",
    "not_faster_in_int8",
    "pack_int8_weight",
    "packed_linear_energy_int8",
    "packed_linear_int8",
    "packed_mlp_int8",
    "quantize_rows",
    "quantize_weight",
    "reference",
    "unsupported_int8",
]

LARGEST_INPUT = 1 << 16  # features, whose sums fit into 32 bits
LARGEST_BYTE = 255  # of inputs
LEAST_STEP = torch.finfo(torch.float32).tiny  # a smaller scale counts as 0
_LARGEST_WEIGHT = 127


def _no_products(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernel does not multiply int8 on this CPU, or None."""
    library = load("gemm")
    if library is None:
        return unavailable_reason("gemm")
    return policy.no_int8_products(bool(library.linear_multiplies_bytes()))


def unsupported_int8(device: torch.device, dtype: torch.dtype) -> str | None:
    """``None`` if the kernel takes maps of this dtype on this CPU, else the reason."""
    reason = packed_linear_int8.refusal(device, dtype)
    return reason or packed_linear_int8.unsupported(device, dtype)


def not_faster_in_int8(device: torch.device) -> str | None:
    """Why int8 does not pay on a device, or None if they do."""
    return unsupported_int8(device, policy.maps_of_int8())


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise a weight symmetrically, with a scale for each output.

    Args:
        weight: (out_features, in_features).

    Returns:
        (out_features, in_features) int8 from -127 to 127, and the scales, (out_features,) float32.
        A row with NaN or infinities has a scale of NaN.
    """
    wide = weight.detach().float()
    scale = wide.abs().amax(1) / _LARGEST_WEIGHT
    scale = torch.where(wide.isfinite().all(1), scale, torch.nan)
    step = torch.where(scale >= LEAST_STEP, scale, torch.inf)
    return (wide / step[:, None]).round().nan_to_num().to(torch.int8), scale


def quantize_rows(x: Tensor, in_range: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Quantise rows as the kernel does, up to rounding.

    Args:
        x: (..., in_features).
        in_range: the scale and the zero of all rows, (2,); default: for each row, those whose bytes
            reach from the smallest to the largest of its values and zero.

    Returns:
        Bytes as float32, (..., in_features), and scales and zeros, (..., 1). A row with NaN or
        infinities has a scale of NaN.
    """
    wide = x.float()
    if in_range is None:
        low, high = wide.amin(-1, True).clamp(max=0), wide.amax(-1, True).clamp(min=0)
        scale = high / LARGEST_BYTE - low / LARGEST_BYTE
        scale = torch.where(scale < LEAST_STEP, 0.0, scale)
        zero = torch.where(scale > 0, (-low / scale).round(), 0.0)
    else:
        scale, zero = (t.expand(*wide.shape[:-1], 1) for t in in_range)
    inverse = torch.where(scale > 0, 1 / scale, 0.0)
    quantized = (wide.double() * inverse + zero).round().clamp(0, LARGEST_BYTE).float()
    finite = wide.isfinite().all(-1, True)
    return quantized.nan_to_num(), torch.where(finite, scale, torch.nan), zero


def reference(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor,
    in_range: Tensor | None = None,
) -> Tensor:
    """The quantised linear layer in plain torch: the meaning of the kernel, without epilogue.

    Args:
        x: (..., in_features).
        weight, weight_scale: of :func:`quantize_weight`.
        bias: (out_features,).
        in_range: see :func:`quantize_rows`.

    Returns:
        (..., out_features) float64.
    """
    quantized, scale, zero = quantize_rows(x, in_range)
    sums = F.linear(quantized.double() - zero.double(), weight.double())  # exact
    return sums * scale.double() * weight_scale.double() + bias.double()


def pack_int8_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise and pack the weight of a linear layer for the kernel.

    Args:
        weight: (out_features, in_features) with at most ``LARGEST_INPUT`` inputs, on the CPU.

    Returns:
        A flat int8 tensor, valid only on this process's CPU, and (2, out_features) float32: the
        outputs' scales, and minus the sums of their dequantised weights.

    Raises:
        ValueError: not a matrix, or too many inputs.
        RuntimeError: the kernel is not available here.
    """
    if weight.ndim != 2 or weight.shape[1] > LARGEST_INPUT:
        raise ValueError(
            f"weight must be (out_features, in_features ≤ {LARGEST_INPUT}), "
            f"got {tuple(weight.shape)}"
        )
    library, reason = load("gemm"), packed_linear_int8.refusal(weight.device, torch.float32)
    if library is None or reason is not None:
        raise RuntimeError(f"the kernel of linear layers is not available: {reason}")
    quantized, scale = quantize_weight(weight)
    sums = quantized.sum(1, dtype=torch.int64).float()
    out_features, in_features = weight.shape
    packed = quantized.new_empty(packed_size(out_features, in_features, torch.int8))
    source = quantized.contiguous()
    shape = [ctypes.c_int64(n) for n in weight.shape]
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (source, packed)]
    library.linear_pack_bytes(pointers[0], *shape, pointers[1])
    return packed, torch.stack((scale, -sums * scale))


@kernel("gemm", "linear_forward", refuses=_no_products)
def packed_linear_int8(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor,
    in_range: Tensor | None = None,
    activation: str = "none",
    other: Tensor | None = None,
    combination: str = "none",
    scale: Tensor | None = None,
    other_scale: Tensor | None = None,
) -> Call:
    """:func:`ops.cpu.gemm.linear.packed_linear` in int8. No gradients.

    Args:
        x: (B, ..., in_features), float32 or bfloat16.
        weight, weight_scale: see :func:`pack_int8_weight`.
        in_range: scale and zero of the inputs of all rows, (2,) float32; default: each row's own.

    Returns:
        (B, ..., out_features) in the dtype of ``x``, contiguous.

    Raises:
        ValueError: mismatched shapes or dtypes, an unknown activation or combination.
        RuntimeError: the kernel is not available here (check :func:`unsupported_int8` first).
    """
    shape = _output_shape(x, weight, weight_scale, bias, in_range, activation, other, combination)
    check_scales(x, bias, combination, scale, other_scale)
    out = x.new_empty(shape)

    def arguments() -> Any:
        rows, in_stride = with_rows(x)
        added, other_stride = with_rows(other)
        problem = linear_problem(
            x,
            len(bias),
            activation,
            combination,
            in_stride=in_stride,
            other_stride=other_stride,
            by_image=scale is not None,
        )
        layer = _layer(weight, weight_scale, bias, in_range, scale)
        combined = {"other": added, "other_scale": dense(other_scale)}
        return problem, Addresses(TENSORS, {**layer, **combined, "in": rows, "out": out})

    return Call(out, arguments)


@kernel("gemm", "linear_forward", returns="(Tensor, Tensor)", refuses=_no_products)
def packed_linear_energy_int8(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor,
    in_range: Tensor | None = None,
    activation: str = "none",
    scale: Tensor | None = None,
) -> Call:
    """:func:`ops.cpu.gemm.linear.packed_linear_energy` in int8. No gradients.

    Raises:
        ValueError, RuntimeError: see :func:`packed_linear_int8`.
    """
    shape = _output_shape(x, weight, weight_scale, bias, in_range, activation)
    check_scales(x, bias, "none", scale, None)
    out = x.new_empty(shape)
    energy = (bias.new_zeros if 0 in shape else bias.new_empty)(shape[0], len(bias))

    def arguments() -> Any:
        rows, in_stride = with_rows(x)
        problem = linear_problem(x, len(bias), activation, in_stride=in_stride, by_image=True)
        layer = _layer(weight, weight_scale, bias, in_range, scale)
        return problem, Addresses(TENSORS, {**layer, "in": rows, "out": out, "energy": energy})

    return Call((out, energy), arguments)


@kernel("gemm", "linear_forward_pair", refuses=_no_products)
def packed_mlp_int8(
    x: Tensor,
    weight1: Tensor,
    weight_scale1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    weight_scale2: Tensor,
    bias2: Tensor,
    in_range1: Tensor | None = None,
    in_range2: Tensor | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
) -> Call:
    """:func:`ops.cpu.gemm.mlp.packed_mlp` in int8. No gradients.

    Hidden rows are stored in the dtype of ``x`` and quantised while they are in the cache.

    Raises:
        ValueError, RuntimeError: see :func:`packed_linear_int8`.
    """
    added = "none" if residual is None else "add"
    hidden = _output_shape(x, weight1, weight_scale1, bias1, in_range1, activation)
    shape = _output_shape(
        x, weight2, weight_scale2, bias2, in_range2, "none", residual, added, hidden
    )
    out = x.new_empty(shape)

    def arguments() -> Any:
        rows, in_stride = with_rows(x)
        other, other_stride = with_rows(residual)
        first = _layer(weight1, weight_scale1, bias1, in_range1)
        second = _layer(weight2, weight_scale2, bias2, in_range2)
        return (
            linear_problem(x, len(bias1), activation, in_stride=in_stride),
            Addresses(TENSORS, {**first, "in": rows}),
            linear_problem(
                x, len(bias2), "none", added, in_features=len(bias1), other_stride=other_stride
            ),
            Addresses(TENSORS, {**second, "other": other, "out": out}),
        )

    return Call(out, arguments)


def _layer(
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor,
    in_range: Tensor | None,
    scale: Tensor | None = None,
) -> dict[str, Tensor | None]:
    """The tensors of a layer by their names in problem.h."""
    dense_scale = None if scale is None else scale.float().contiguous()
    return {
        **{"weight": weight, "weight_scale": dense(weight_scale), "bias": bias},
        **{"in_range": in_range, "scale": dense_scale},
    }


def _output_shape(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor,
    in_range: Tensor | None,
    activation: str,
    other: Tensor | None = None,
    combination: str = "none",
    shape: Sequence[int] | None = None,
) -> tuple[int, ...]:
    """Check the arguments of a layer; return the output shape."""
    require_dtype(torch.float32, weight_scale=weight_scale, in_range=in_range)
    out_shape = output_shape(x, weight, bias, activation, other, combination, shape, torch.int8)
    if weight_scale.shape != (2, len(bias)):
        raise ValueError(f"weight_scale must be {(2, len(bias))}, got {tuple(weight_scale.shape)}")
    if in_range is not None and in_range.shape != (2,):
        raise ValueError(f"in_range must be (2,), got {tuple(in_range.shape)}")
    return out_shape
