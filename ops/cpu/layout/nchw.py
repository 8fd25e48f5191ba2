"""Convert NHWC maps to NCHW and back on the CPU for inference, with a fused affine and shortcut.

Some layers read a map in NCHW, while all others are channels-last. The kernel (``nchw.cpp``)
transposes tiles in registers. Torch takes several passes, which are slow for mixed layouts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ops.arguments import require_shapes
from ops.cpu.call.binding import kernel
from ops.cpu.call.c_arguments import Call
from ops.cpu.call.dispatch import require_dtype
from ops.cpu.call.tensors import empty_nhwc
from ops.cpu.threads import VALUES, threads_for


@kernel("nchw", "nchw_from_nhwc")
def nchw_from_nhwc(x: Tensor, affine: Tensor) -> Call:
    """``x * scale + shift`` per channel, in NCHW. No gradients.

    Args:
        x: (B, C, H, W), float32 or bfloat16; copied unless channels-last.
        affine: (2, C) float32, the scales and the shifts.

    Returns:
        (B, C, H, W), contiguous, in the dtype of ``x``.
    """
    require_shapes(x=(x, "batch channels height width"), affine=(affine, "2 channels"))
    require_dtype(torch.float32, affine=affine)
    return Call(x.new_empty(x.shape), lambda: {**_sizes(x), "in": _nhwc(x)})


@kernel("nchw", "nchw_to_nhwc")
def nhwc_from_nchw(nchw: Tensor, x: Tensor) -> Call:
    """``nchw + x``, channels-last. No gradients.

    Args:
        nchw: (B, C, H, W), float32 or bfloat16; copied unless contiguous.
        x: the same shape and dtype; copied unless channels-last.

    Returns:
        (B, C, H, W), channels-last, in the dtype of ``x``.
    """
    axes = "batch channels height width"
    require_shapes(x=(x, axes), nchw=(nchw, axes))
    require_dtype(x.dtype, nchw=nchw)
    return Call(
        empty_nhwc(x, x.shape), lambda: {**_sizes(x), "in": nchw.contiguous(), "other": _nhwc(x)}
    )


def _nhwc(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _sizes(x: Tensor) -> dict[str, Any]:
    batch, channels, height, width = x.shape
    threads = threads_for(x.numel(), VALUES)
    return {"batch": batch, "channels": channels, "pixels": height * width, "threads": threads}
