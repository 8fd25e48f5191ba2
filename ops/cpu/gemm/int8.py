"""Linear layers in int8 on the CPU for inference, with fused epilogues.

The kernel (``int8.h``) multiplies unsigned bytes of inputs by signed bytes of weights, with exact
sums in 32 bits. Weights have a scale for each output. Rows of inputs have scale and zero of their
own, found as they are quantised, or those of a calibration, which takes one pass less.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ops.cpu import policy
from ops.cpu.build import load, unavailable_reason
from ops.cpu.call.c_arguments import pack
from ops.cpu.call.huge_pages import empty_weight
from ops.cpu.gemm.linear import packed_linear
from ops.cpu.gemm.problem import packed_size

LARGEST_INPUT = 1 << 16  # features, whose sums fit into 32 bits
LARGEST_BYTE = 255  # of inputs
LEAST_STEP = torch.finfo(torch.float32).tiny  # a smaller scale counts as 0
_LARGEST_WEIGHT = 127


def int8_unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """``None`` if the kernel supports maps of this dtype on this CPU, else the reason."""
    reason, library = packed_linear.unavailable(device, dtype), load("gemm")
    if reason is not None or library is None:
        return reason or unavailable_reason("gemm")
    return policy.no_int8_products(bool(library.linear_multiplies_bytes()))


def not_faster_in_int8(device: torch.device) -> str | None:
    """Why int8 does not pay on a device, or None if they do."""
    return int8_unavailable(device, policy.maps_of_int8())


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
    """
    if weight.ndim != 2 or weight.shape[1] > LARGEST_INPUT:
        raise ValueError(
            f"weight must be (out_features, in_features ≤ {LARGEST_INPUT}), "
            f"got {tuple(weight.shape)}"
        )
    library, reason = load("gemm"), int8_unavailable(weight.device, torch.float32)
    if library is None or reason is not None:
        raise RuntimeError(f"the kernel of linear layers is not available: {reason}")
    quantized, scale = quantize_weight(weight)
    sums = quantized.sum(1, dtype=torch.int64).float()
    out_features, in_features = weight.shape
    packed = empty_weight(packed_size(out_features, in_features, torch.int8), torch.int8)
    source = quantized.contiguous()
    library.linear_pack_bytes(*map(pack, (source, *weight.shape, packed)))
    return packed, torch.stack((scale, -sums * scale))
