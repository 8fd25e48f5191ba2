"""Dense convolutions on the CPU for inference, as linear layers on windows (im2col).

The kernel (in ``gemm.cpp``) copies the windows of a few pixels at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ops.cpu.activations import require_activation
from ops.cpu.call.binding import kernel
from ops.cpu.call.c_arguments import Call, sizes_of
from ops.cpu.call.dispatch import require_dtype
from ops.cpu.call.tensors import bias_of, empty_nhwc
from ops.cpu.gemm.linear import no_products, pack_weight
from ops.cpu.threads import MACS, threads_for

_FEW_CHANNELS = 4  # of images
_SHORTEST_RUN = 32  # bytes, of a window's row that is worth copying by itself


def convolved_size(
    x: Tensor, kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> list[int]:
    """Rows and columns of a convolution of ``x``, (B, C, H, W), if it is not too small."""
    size = [
        (n + 2 * p - k) // s + 1
        for n, k, s, p in zip(x.shape[2:], kernel_size, stride, padding, strict=True)
    ]
    if min(size) < 1:
        raise ValueError(
            f"a map of {tuple(x.shape[2:])} with padding {tuple(padding)} is smaller than the "
            f"window of {tuple(kernel_size)}"
        )
    return size


class PackedConv2d:
    """``activation(conv(x))``.

    Args:
        conv: without groups or dilation, zero-padded, in float32 or bfloat16.
        pack_int8: gives packed weight, its scales, bias and, or None, the range of inputs for a
            weight (out_features, in_features) and a bias, to compute in int8; see
            :func:`ops.cpu.gemm.linear.packed_linear`.
    """

    def __init__(self, conv: nn.Conv2d, pack_int8: Callable[..., Any] | None = None) -> None:
        padding: Any = conv.padding
        if conv.groups != 1 or conv.dilation != (1, 1):
            raise ValueError(f"a convolution must have no groups and no dilation, got {conv}")
        if isinstance(padding, str) or conv.padding_mode != "zeros":
            raise ValueError(f"a convolution must be padded with a number of zeros, got {conv}")
        weight = conv.weight.detach()
        self._by_channel = (
            conv.in_channels <= _FEW_CHANNELS
            and conv.kernel_size[1] * weight.itemsize >= _SHORTEST_RUN
        )
        inputs = weight if self._by_channel else weight.permute(0, 2, 3, 1)
        rows = inputs.flatten(1).contiguous()
        self._scales: tuple[Tensor | None, Tensor | None] = None, None
        if pack_int8 is None:
            self._weight, self._bias = pack_weight(rows), bias_of(conv)
        else:
            self._weight, weight_scale, self._bias, in_range = pack_int8(rows, bias_of(conv))
            self._scales = weight_scale, in_range
        self._geometry = [conv.in_channels, *conv.kernel_size, *conv.stride, *padding]

    def __call__(self, x: Tensor, activation: str = "none") -> Tensor:
        """(B, C, H, W) → (B, C', H', W'), channels-last; see :func:`packed_conv2d`."""
        packed = self._weight, self._bias, self._geometry
        out: Tensor = packed_conv2d(x, *packed, activation, self._by_channel, *self._scales)
        return out


@kernel("gemm", "convolution_forward", refuses=no_products)
def packed_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    geometry: Sequence[int],
    activation: str = "none",
    by_channel: bool = False,
    weight_scale: Tensor | None = None,
    in_range: Tensor | None = None,
) -> Call:
    """A convolution and an activation. No gradients.

    Args:
        x: (B, C, H, W), in the dtype of a weight in floats; copied unless channels-last, or
            contiguous with few channels.
        weight: the packed weight of shape (C', kh · kw · C); (C', C · kh · kw) if ``by_channel``.
        bias: (C',) float32.
        geometry: C, then rows and columns of the kernel, the stride and the padding.
        activation: one of :data:`ops.cpu.activations.ACTIVATIONS`.
        by_channel: read windows from NCHW, row by row; ``x`` is copied unless contiguous.
        weight_scale, in_range: of a weight in int8, see
            :func:`ops.cpu.gemm.linear.packed_linear`. Without a range, each window has its own.

    Returns:
        (B, C', H', W'), channels-last.
    """
    channels, *sides = geometry
    wanted = weight.dtype if weight_scale is None else x.dtype
    if x.ndim != 4 or x.shape[1] != channels or x.dtype != wanted:
        raise ValueError(
            f"x must be (B, {channels}, H, W) of {wanted}, got {tuple(x.shape)} of {x.dtype}"
        )
    if weight_scale is not None and (
        weight.dtype != torch.int8 or weight_scale.shape != (2, len(bias))
    ):
        raise ValueError(
            f"weight_scale must be {(2, len(bias))} for a weight in int8, got "
            f"{tuple(weight_scale.shape)} for {weight.dtype}"
        )
    require_dtype(torch.float32, bias=bias, weight_scale=weight_scale, in_range=in_range)
    require_activation(activation)
    kernel_size, stride, padding = sides[:2], sides[2:4], sides[4:]
    size = convolved_size(x, kernel_size, stride, padding)
    out = empty_nhwc(x, (len(x), len(bias), *size))

    def arguments() -> Any:
        is_nchw = channels <= _FEW_CHANNELS and x.is_contiguous()
        is_nchw &= not x.is_contiguous(memory_format=torch.channels_last)
        is_nchw |= by_channel
        order = torch.contiguous_format if is_nchw else torch.channels_last
        return {
            **sizes_of(x, "batch channels height width"),
            **{"out_height": size[0], "out_width": size[1], "out_channels": len(bias)},
            **{"kernel": kernel_size, "stride": stride, "padding": padding},
            "threads": threads_for(out.numel() * channels * math.prod(kernel_size), MACS),
            "is_nchw": is_nchw,
            "in": x.contiguous(memory_format=order),
        }

    return Call(out, arguments)
