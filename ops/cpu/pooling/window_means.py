"""Means of windows on the CPU for inference: pooling, squeeze layers, region descriptors.

The kernel (``pooling.cpp``) reads NHWC in memory order; torch takes many times as long for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ops.arguments import require_shapes
from ops.cpu.call.binding import kernel
from ops.cpu.call.c_arguments import Call
from ops.cpu.call.tensors import dense_channels
from ops.cpu.threads import VALUES, threads_for


@kernel("pooling", "pooling_forward")
def window_means(x: Tensor, window_size: Sequence[int]) -> Call:
    """The means of adjacent windows, over the pixels inside the map. No gradients.

    Args:
        x: (B, H, W, C), float32 or bfloat16; copied unless the channels are dense.
        window_size: rows and columns of a window.

    Returns:
        (B, ⌈H/rows⌉, ⌈W/columns⌉, C), contiguous, in the dtype of ``x``; sums are in float32.
    """
    sizes = require_shapes(x=(x, "batch height width channels"))
    if min(window_size) < 1 or 0 in x.shape[1:3]:
        raise ValueError(
            f"window and map must not be empty, got {tuple(window_size)} and {tuple(x.shape)}"
        )
    rows, columns = (-(-n // side) for n, side in zip(x.shape[1:3], window_size, strict=True))
    out = x.new_empty(x.shape[0], rows, columns, x.shape[3])

    def arguments() -> Any:
        nhwc = dense_channels(x)
        return {
            **sizes,
            "stride": nhwc.stride()[:3],
            "window": tuple(window_size),
            "threads": threads_for(x.numel(), VALUES),
            "in": nhwc,
        }

    return Call(out, arguments)
