"""Linear layers on the CPU for inference, with fused epilogues.

The kernel (``gemm.h``) prefetches weights. It is for one or a few threads, where oneDNN stalls on
weights for much of a small batch. Sums are accumulated in float32. On CPUs without bfloat16
products, bfloat16 operands are converted to float32 as they are loaded.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ops.cpu.build import load, unavailable_reason
from ops.cpu.call.binding import kernel
from ops.cpu.call.c_arguments import Call, pack
from ops.cpu.call.huge_pages import empty_weight
from ops.cpu.gemm.problem import check_scales, linear_problem, output_shape, packed_size, with_rows
from ops.cpu.policy import multiplies

__all__ = [
    "no_pairs",
    "no_products",
    "pack_weight",
    "packed_linear",
    "packed_linear_energy",
]


def no_products(device: torch.device, dtype: torch.dtype) -> str | None:
    """``None`` if kernels multiply ``dtype`` as fast as torch, else the reason."""
    library = load("gemm")
    half = dtype == torch.bfloat16 and multiplies(dtype)
    if half and library is not None and not library.linear_multiplies_bfloat16():
        return "torch uses bfloat16 instructions on this CPU, the kernel would compute in float32"
    return unavailable_reason("gemm")


def no_pairs(device: torch.device, dtype: torch.dtype) -> str | None:
    """``None`` if kernels multiply ``dtype`` without converting it to float32, else the reason."""
    if dtype == torch.bfloat16 and not multiplies(dtype):
        return "bfloat16 needs a CPU with bfloat16 instructions"
    return no_products(device, dtype)


def pack_weight(weight: Tensor) -> Tensor:
    """Pack the weight of a linear layer for the kernel.

    Args:
        weight: (out_features, in_features), float32 or bfloat16, on the CPU.

    Returns:
        A flat tensor of the same dtype, valid only on this process's CPU.

    Raises:
        ValueError: not a matrix.
        RuntimeError: the kernel is not available here.
    """
    if weight.ndim != 2:
        raise ValueError(f"weight must be (out_features, in_features), got {tuple(weight.shape)}")
    library = load("gemm")
    reason = packed_linear.unavailable(weight.device, weight.dtype, even_if_slower=True)
    if library is None or reason is not None:
        raise RuntimeError(f"the kernel of linear layers is not available: {reason}")
    source = weight.detach().contiguous()
    out_features, in_features = weight.shape
    packed = empty_weight(packed_size(out_features, in_features, weight.dtype), weight.dtype)
    half = weight.dtype == torch.bfloat16
    library.linear_pack(*map(pack, (source, *weight.shape, half, packed)))
    return packed


@kernel("gemm", "linear_forward", refuses=no_products)
def packed_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    activation: str = "none",
    other: Tensor | None = None,
    combination: str = "none",
    scale: Tensor | None = None,
    other_scale: Tensor | None = None,
    weight_scale: Tensor | None = None,
    in_range: Tensor | None = None,
    gate: Tensor | None = None,
) -> Call:
    """``activation((x * scale) @ weight.T + bias)``, combined with ``other``. No gradients.

    Args:
        x: (B, ..., in_features), float32 or bfloat16. Rows with a constant stride are not copied.
        weight: see :func:`pack_weight`, in the dtype of ``x``, or with ``weight_scale``
            :func:`ops.cpu.gemm.int8.pack_int8_weight`.
        bias: (out_features,) float32; its length sets the width of the result.
        activation: one of :data:`ops.cpu.activations.ACTIVATIONS`.
        other: (B, ..., out_features), in the dtype of ``x``.
        combination: one of :data:`ops.cpu.gemm.problem.COMBINATIONS`: the output ``+ other``,
            ``* other`` or ``+ other * other_scale``. With ``add_clipped``, ReLU or ReLU6 is applied
            to the sum; with ``add_gated``, to ``gate * output + other``.
        scale: (B, in_features), float32 or in the dtype of ``x``, multiplied with the inputs.
        other_scale: (out_features,) float32, only for ``add_scaled``.
        in_range: for int8, scale and zero of the inputs of all rows, (2,) float32; default: each
            row's own.
        gate: (B, out_features) in the dtype of ``x``, only for ``add_gated``.

    Returns:
        (B, ..., out_features), contiguous; sums are in float32.

    Raises:
        ValueError: mismatched shapes or dtypes, an unknown activation or combination.
        RuntimeError: the kernel is not available here, or not in int8.
    """
    int8: Any = {"weight_scale": weight_scale, "in_range": in_range}
    shape = output_shape(x, weight, bias, activation, other, combination, **int8)
    check_scales(x, bias, combination, scale, other_scale, gate)

    def arguments() -> dict[str, Any]:
        added, other_stride = with_rows(other)
        by_image = gate is not None
        inputs = _inputs(x, bias, activation, scale, combination, other_stride, by_image)
        return {**inputs, "other": added}

    return Call(x.new_empty(shape), arguments)


@kernel("gemm", "linear_forward", returns=2, refuses=no_products)
def packed_linear_energy(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    activation: str = "none",
    scale: Tensor | None = None,
    weight_scale: Tensor | None = None,
    in_range: Tensor | None = None,
) -> Call:
    """As :func:`packed_linear`, also returning the sums of squares of the results per image.

    Returns:
        (B, ..., out_features), contiguous, and (B, out_features) float32.

    Raises:
        ValueError, RuntimeError: see :func:`packed_linear`.
    """
    int8: Any = {"weight_scale": weight_scale, "in_range": in_range}
    shape = output_shape(x, weight, bias, activation, **int8)
    check_scales(x, bias, "none", scale, None)
    out = x.new_empty(shape)
    new = bias.new_zeros if 0 in shape else bias.new_empty
    energy = new(shape[0], len(bias))

    def arguments() -> dict[str, Any]:
        results = {"out": out, "energy": energy}
        return {**_inputs(x, bias, activation, scale, by_image=True), **results}

    return Call((out, energy), arguments)


def _inputs(
    x: Tensor,
    bias: Tensor,
    activation: str,
    scale: Tensor | None,
    combination: str = "none",
    other_stride: int = 0,
    by_image: bool = False,
) -> dict[str, Any]:
    """Sizes and inputs of both kernels."""
    rows, in_stride = with_rows(x)
    problem = linear_problem(
        x,
        len(bias),
        activation,
        combination,
        in_stride=in_stride,
        other_stride=other_stride,
        by_image=by_image or scale is not None,
        half_scale=scale is not None and scale.dtype == torch.bfloat16,
    )
    dense_scale = None if scale is None else scale.contiguous()
    return {"problem": problem, "in": rows, "scale": dense_scale}
