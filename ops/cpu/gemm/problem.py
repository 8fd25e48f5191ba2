"""Argument checks of linear layers, and the sizes passed to their kernel."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ops.cpu.activations import require_activation
from ops.cpu.build import status
from ops.cpu.call.dispatch import require_dtype
from ops.cpu.threads import MACS, threads_for

# In the order of `linear::Combination` in problem.h.
COMBINATIONS = ("none", "add", "multiply", "add_scaled", "add_clipped", "add_gated")


def packed_size(out_features: int, in_features: int, dtype: torch.dtype) -> int:
    """The number of elements of a linear layer's packed weight."""
    gemm = status("gemm")
    if gemm.library is None:
        raise RuntimeError(f"the kernel of linear layers is not available: {gemm.reason}")
    sizes = [ctypes.c_int64(int(n)) for n in (out_features, in_features)]
    if dtype == torch.int8:
        gemm.library.linear_packed_bytes.restype = ctypes.c_int64
        return int(gemm.library.linear_packed_bytes(*sizes))
    gemm.library.linear_packed_size.restype = ctypes.c_int64
    return int(gemm.library.linear_packed_size(*sizes, dtype == torch.bfloat16))


def output_shape(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    activation: str = "none",
    other: Tensor | None = None,
    combination: str = "none",
    shape: Sequence[int] | None = None,
    weight_scale: Tensor | None = None,
    in_range: Tensor | None = None,
) -> tuple[int, ...]:
    """Check the arguments of :func:`ops.cpu.gemm.linear.packed_linear`; return the output shape.

    Args:
        shape: the shape of the input, if it differs from that of ``x``.
    """
    require_activation(activation)
    if combination not in COMBINATIONS or (combination == "none") != (other is None):
        raise ValueError(
            f"combination must be one of {COMBINATIONS}, other than 'none' if and only if there "
            f"is something to combine with; got {combination!r}"
        )
    if combination == "add_gated" and activation not in ("none", "relu", "relu6"):
        raise ValueError(f"'add_gated' takes no activation, relu or relu6, got {activation!r}")
    if combination == "add_clipped" and activation not in ("relu", "relu6"):
        raise ValueError(f"'add_clipped' requires the activation relu or relu6, got {activation!r}")
    if weight.dtype == torch.int8:
        _check_int8(bias, weight_scale, in_range)
    elif x.dtype != weight.dtype:
        raise ValueError(f"x is {x.dtype} and its weight {weight.dtype}; they must be the same")
    elif weight_scale is not None or in_range is not None:
        raise ValueError(f"weight_scale and in_range are for weights in int8, not {weight.dtype}")
    require_dtype(torch.float32, bias=bias)
    require_dtype(x.dtype, other=other)
    shape = x.shape if shape is None else shape
    fits = len(shape) > 1 and bias.ndim == 1
    if not fits or weight.numel() != packed_size(len(bias), shape[-1], weight.dtype):
        raise ValueError(
            f"x must be (B, ..., in_features) and weight packed for in_features and {len(bias)} "
            f"outputs, got {tuple(shape)} and {weight.numel()} packed numbers"
        )
    out_shape = (*shape[:-1], len(bias))
    if other is not None and tuple(other.shape) != out_shape:
        raise ValueError(f"other must be {out_shape}, got {tuple(other.shape)}")
    return out_shape


def _check_int8(bias: Tensor, weight_scale: Tensor | None, in_range: Tensor | None) -> None:
    require_dtype(torch.float32, weight_scale=weight_scale, in_range=in_range)
    if weight_scale is None or weight_scale.shape != (2, len(bias)):
        given = None if weight_scale is None else tuple(weight_scale.shape)
        raise ValueError(f"weight_scale must be {(2, len(bias))}, got {given}")
    if in_range is not None and in_range.shape != (2,):
        raise ValueError(f"in_range must be (2,), got {tuple(in_range.shape)}")


def check_scales(
    x: Tensor,
    bias: Tensor,
    combination: str,
    scale: Tensor | None,
    other_scale: Tensor | None,
    gate: Tensor | None = None,
) -> None:
    """Check the scales of :func:`ops.cpu.gemm.linear.packed_linear`."""
    if scale is not None and scale.shape != (x.shape[0], x.shape[-1]):
        raise ValueError(f"scale must be {(x.shape[0], x.shape[-1])}, got {tuple(scale.shape)}")
    if scale is not None and scale.dtype not in (torch.float32, x.dtype):
        raise ValueError(f"scale must be torch.float32 or {x.dtype}, got {scale.dtype}")
    require_dtype(torch.float32, other_scale=other_scale)
    require_dtype(x.dtype, gate=gate)
    for name, t, needed_by, shape in (
        ("other_scale", other_scale, "add_scaled", (len(bias),)),
        ("gate", gate, "add_gated", (x.shape[0], len(bias))),
    ):
        wanted = shape if combination == needed_by else None
        found = None if t is None else tuple(t.shape)
        if wanted != found:
            raise ValueError(f"{name} must be {wanted} with {combination!r}, got {found}")


def with_rows(t: Tensor | None) -> tuple[Tensor | None, int]:
    """``t``, copied unless its rows are dense with a constant stride over 0, and that stride."""
    if t is None:
        return None, 0
    stride = _row_stride(tuple(t.shape), t.stride())
    return (t.contiguous(), t.shape[-1]) if stride is None else (t, stride)


def _row_stride(shape: tuple[int, ...], strides: tuple[int, ...]) -> int | None:
    """The row stride, or None unless it is constant, not 0, and the rows are dense."""
    if strides[-1] != 1 and shape[-1] != 1:
        return None
    first, span = None, 0
    for size, stride in zip(reversed(shape[:-1]), reversed(strides[:-1]), strict=True):
        if size == 1:
            continue
        if stride == 0:
            return None
        if first is None:
            first = stride
        elif stride != span:
            return None
        span = stride * size
    return shape[-1] if first is None else first


def linear_problem(
    x: Tensor,
    out_features: int,
    activation: str = "none",
    combination: str = "none",
    *,
    in_features: int = 0,
    in_stride: int = 0,
    other_stride: int = 0,
    by_image: bool = False,
    half_scale: bool = False,
) -> dict[str, Any]:
    """The sizes of a layer applied to ``x``, (B, ..., in_features), or to as many other rows.

    Args:
        in_features: the width of the rows, if it differs from that of ``x``.
        in_stride, other_stride: row strides; default those of contiguous tensors.
        by_image: whether scales or sums of squares are per image.
        half_scale: whether scales are in bfloat16.
    """
    rows, in_features = math.prod(x.shape[:-1]), in_features or x.shape[-1]
    return {
        **{"rows": rows, "in_features": in_features, "out_features": out_features},
        **{"in_stride": in_stride or in_features, "out_stride": out_features},
        "other_stride": other_stride or out_features,
        "image_rows": rows // max(1, len(x)) if by_image else 0,
        **{"activation": activation, "combination": COMBINATIONS.index(combination)},
        **{"bfloat16": x.dtype == torch.bfloat16, "half_scale": half_scale},
        "threads": threads_for(rows * in_features * out_features, MACS),
    }
