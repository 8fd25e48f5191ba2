"""Depthwise convolution of channels-last maps on the CPU, for inference.

The kernels (``depthwise.h``, ``depthwise.cpp``) cover the cases where torch is slow: large windows,
dilated ones, 1×k and k×1, and fused activations.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ops.cpu.activations import require_activation
from ops.cpu.call.binding import kernel
from ops.cpu.call.c_arguments import Call
from ops.cpu.call.dispatch import require_dtype
from ops.cpu.call.tensors import as_nhwc, empty_nhwc
from ops.cpu.threads import MACS, threads_for

__all__ = ["depthwise_branches", "depthwise_conv2d", "taps_first", "unavailable"]


def taps_first(weight: Tensor) -> Tensor:
    """Reorder the weight of a depthwise convolution for the kernel.

    Args:
        weight: (C', 1, kh, kw).

    Returns:
        (kh, kw, C'), contiguous, float32.
    """
    return weight.detach().squeeze(1).permute(1, 2, 0).to(torch.float32).contiguous()


def unavailable(stride: Sequence[int], device: torch.device, dtype: torch.dtype) -> str | None:
    """``None`` if the kernel accepts such a convolution, else the reason.

    The first call on a machine compiles the kernel, which takes a few seconds.
    """
    if not 1 <= stride[1] <= 2:
        return f"the kernel supports strides of 1 and 2, not {stride[1]}"
    return depthwise_conv2d.unavailable(device, dtype)


@kernel("depthwise", "depthwise_forward")
def depthwise_conv2d(
    x: Tensor,
    taps: Tensor,
    bias: Tensor | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    activation: str = "none",
) -> Call:
    """Convolve each channel with its own windows, then apply an activation. No gradients.

    Args:
        x: (B, C, H, W), float32 or bfloat16; copied unless channels-last.
        taps: (kh, kw, C') float32, see :func:`taps_first`; C' is C or a multiple of it. With a map
            in bfloat16, kernels may round them to it.
        bias: (C',) float32.
        stride: of rows and columns; the column stride must be 1 or 2.
        padding: zeros on both sides of rows and columns.
        dilation: of rows and columns.
        activation: one of :data:`ops.cpu.activations.ACTIVATIONS`.

    Returns:
        (B, C', H', W'), channels-last, in the dtype of ``x``; sums are in float32.

    Raises:
        ValueError: mismatched shapes or dtypes, or an unknown activation.
    """
    if x.ndim != 4 or taps.ndim != 3 or not x.shape[1] or taps.shape[2] % x.shape[1]:
        raise ValueError(
            "x must be (B, C, H, W) and taps (kh, kw, n · C), got "
            f"{tuple(x.shape)} and {tuple(taps.shape)}"
        )
    if bias is not None and bias.shape != taps.shape[2:]:
        raise ValueError(f"bias must be ({taps.shape[2]},), got {tuple(bias.shape)}")
    require_dtype(torch.float32, taps=taps, bias=bias)
    require_activation(activation)
    if not 1 <= stride[1] <= 2:
        raise RuntimeError(f"the kernel supports strides of 1 and 2, not {stride[1]}")
    size = []
    for axis in range(2):
        reach = dilation[axis] * (taps.shape[axis] - 1)
        free = x.shape[2 + axis] + 2 * padding[axis] - reach - 1
        if free < 0:
            raise ValueError(
                f"a map of {x.shape[2]}×{x.shape[3]}, padded by {tuple(padding)}, is smaller than "
                f"a window of {taps.shape[0]}×{taps.shape[1]} with dilation {tuple(dilation)}"
            )
        size.append(free // stride[axis] + 1)
    out = empty_nhwc(x, (x.shape[0], taps.shape[2], *size))

    def arguments() -> dict[str, Any]:
        pixels = as_nhwc(x)
        sizes = {**_sizes(pixels, out, taps), "multiplier": taps.shape[2] // x.shape[1]}
        return {**sizes, "in": pixels, "weight": taps.contiguous()}

    return Call(out, arguments)


@kernel("depthwise", "depthwise_branches")
def depthwise_branches(x: Tensor, taps: Sequence[Tensor], biases: Sequence[Tensor]) -> Call:
    """Convolve groups of the last channels, each with its own kernel size; the first pass through.

    No gradients.

    Args:
        x: (B, C, H, W), as for :func:`depthwise_conv2d`.
        taps: (kh, kw, c) each, with odd kernel sizes, float32; at most C channels in total.
        biases: (c,) each, float32.

    Returns:
        (B, C, H, W), channels-last.

    Raises:
        ValueError, RuntimeError: see :func:`depthwise_conv2d`.
    """
    kernels = [tuple(t.shape) for t in taps]
    start = x.shape[1] - sum(kernel[2] for kernel in kernels)
    if not kernels or start < 0 or [b.shape for b in biases] != [k[2:] for k in kernels]:
        raise ValueError(
            f"taps must be (kh, kw, c) each, with at most {x.shape[1]} channels together, and "
            f"biases (c,), got {kernels} and {[tuple(b.shape) for b in biases]}"
        )
    if any(rows % 2 == 0 or columns % 2 == 0 for rows, columns, _ in kernels):
        raise ValueError(f"kernels of branches must be odd, got {kernels}")
    starts = list(accumulate((width for _, _, width in kernels[:-1]), initial=start))
    for t, bias in zip(taps, biases, strict=True):
        require_dtype(torch.float32, taps=t, biases=bias)
    out = empty_nhwc(x, x.shape)

    def arguments() -> dict[str, Any]:
        pixels, step = as_nhwc(x), x.element_size()
        of_all: dict[str, Any] = {"bfloat16": x.dtype == torch.bfloat16, "multiplier": 1}
        of_all |= {"stride": (1, 1), "dilation": (1, 1)}
        problems, tensors = [], []
        for start, t, bias in zip(starts, taps, biases, strict=True):
            padding = [side // 2 for side in t.shape[:2]]
            problems.append({**_sizes(pixels, out, t), **of_all, "padding": padding})
            place = {"in": (pixels, start * step), "out": (out, start * step)}
            tensors.append({**place, "weight": t, "bias": bias})
        branches = {"problems": problems, "tensors": tensors}
        return {**branches, "count": len(taps), "passed": starts[0]}

    return Call(out, arguments)


def _sizes(x: Tensor, out: Tensor, taps: Tensor) -> dict[str, Any]:
    """The sizes of a call for the channels in ``taps``."""
    size, out_size = tuple(x.shape[2:]), tuple(out.shape[2:])
    work = len(x) * math.prod(out_size) * taps.numel()
    return {
        **{"batch": len(x), "channels": taps.shape[2], "size": size, "out_size": out_size},
        **{"kernel": tuple(taps.shape[:2]), "threads": threads_for(work, MACS)},
        **{"in_stride": _strides(x), "out_stride": _strides(out)},
    }


def _strides(x: Tensor) -> tuple[int, int, int]:
    """The strides of images, rows and pixels."""
    batch, _, row, pixel = x.stride()
    return batch, row, pixel
