"""Deformable convolution of channels-last maps on the CPU, for inference.

The kernel interpolates the inputs of some pixels at a time and applies a linear
layer with packed weights while they are in the cache.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ops.arguments import require_shapes
from ops.cpu.activations import require_activation
from ops.cpu.call.binding import kernel
from ops.cpu.call.c_arguments import Call, sizes_of
from ops.cpu.call.dispatch import require_dtype
from ops.cpu.call.tensors import as_nhwc
from ops.cpu.gemm.linear import no_products, pack_weight
from ops.cpu.gemm.problem import packed_size
from ops.cpu.threads import MACS, threads_for


def pack_taps(weight: Tensor) -> Tensor:
    """Pack the weight of a convolution, (out_chs, in_chs, k, k), for the kernel."""
    return pack_weight(weight.detach().permute(0, 2, 3, 1).flatten(1))


@kernel("deformable", "deformable_forward", refuses=no_products)
def deformable_conv2d(
    x: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor,
    kernel_size: int,
    stride: int,
    activation: str = "none",
) -> Call:
    """``torchvision.ops.deform_conv2d`` without padding or mask, then an activation.

    Args:
        x: (B, C, H, W), float32 or bfloat16 like the weight; copied unless channels-last.
        offset: (B, 2·k², H', W'), of any dtype: row and column offsets of each tap, where
            H' = (H - k) // stride + 1.
        weight: see :func:`pack_taps`.
        bias: (out_chs,) float32.
        kernel_size, stride: k and stride, the same for rows and columns.
        activation: one of :data:`ops.cpu.activations.ACTIVATIONS`; GELU is the exact one.

    Returns:
        (B, out_chs, H', W'), channels-last.
    """
    require_activation(activation)
    height, width = ((n - kernel_size) // stride + 1 for n in x.shape[2:])
    offsets = {"offsets": 2 * kernel_size**2, "out_height": height, "out_width": width}
    axes = "batch offsets out_height out_width"
    require_shapes(offsets, x=(x, "batch channels height width"), offset=(offset, axes))
    require_dtype(x.dtype, weight=weight)
    require_dtype(torch.float32, bias=bias)
    inputs = x.shape[1] * kernel_size**2
    if weight.numel() != packed_size(len(bias), inputs, x.dtype):
        raise ValueError(f"weight is not packed for {len(bias)} outputs of {inputs} inputs")
    out = x.new_empty(x.shape[0], height, width, len(bias)).permute(0, 3, 1, 2)

    def arguments() -> Any:
        nhwc = as_nhwc(x)
        return {
            **sizes_of(x, "batch channels height width"),
            **{"out_height": height, "out_width": width, "out_features": len(bias)},
            "kernel": kernel_size,
            "in_stride": (nhwc.stride(0), nhwc.stride(2), nhwc.stride(3)),
            "threads": threads_for(out.numel() * inputs, MACS),
            "in": nhwc,
            "offset": offset.permute(0, 2, 3, 1).float().contiguous(),
        }

    return Call(out, arguments)
