"""Max and average pooling on the CPU for inference, with overlapping windows and padding.

The kernel (``window_pool.cpp``) reads NHWC in memory order.
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


@kernel("window_pool", "window_pool_forward")
def window_pool(
    x: Tensor,
    window_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    size: Sequence[int],
    means: bool = False,
    counts_padding: bool = False,
) -> Call:
    """Maxima or means of windows. NaN if a window has one. No gradients.

    Args:
        x: (B, H, W, C), float32 or bfloat16; copied unless the channels are dense.
        window_size, stride, padding: rows and columns, as of ``torch.nn.MaxPool2d``.
        size: rows and columns of the result; each window must contain a pixel of the map.
        means: means instead of maxima; sums are in float32.
        counts_padding: a mean is over the padding as well, whose values are zeros.

    Returns:
        (B, *size, C), contiguous, in the dtype of ``x``.
    """
    sizes = require_shapes(x=(x, "batch height width channels"))
    for n, window, step, pad, count in zip(
        x.shape[1:3], window_size, stride, padding, size, strict=True
    ):
        inside = 0 <= pad < window and count >= 1 and step >= 1 and (count - 1) * step - pad < n
        if not inside or n < 1:
            raise ValueError(
                "each window must contain a pixel of the map, got "
                f"{count} windows of {window}, {step} apart, padding {pad} and {n} pixels"
            )
    out = x.new_empty(x.shape[0], *size, x.shape[3])

    def arguments() -> Any:
        nhwc = dense_channels(x)
        return {
            **sizes,
            "map_stride": nhwc.stride()[:3],
            "window": tuple(window_size),
            **{"stride": tuple(stride), "padding": tuple(padding)},
            **{"rows": size[0], "columns": size[1]},
            "threads": threads_for(x.numel(), VALUES),
            "in": nhwc,
        }

    return Call(out, arguments)
