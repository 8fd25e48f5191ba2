"""Convolutions on the CPU for inference, dense or in groups of several channels.

The kernel (``direct.cpp``) reads windows where they lie in an NHWC map. It supports float32, and
bfloat16 if the CPU has vector products of bfloat16.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ops.cpu.activations import require_activation
from ops.cpu.call.binding import kernel
from ops.cpu.call.c_arguments import Call, sizes_of
from ops.cpu.call.dispatch import require_dtype
from ops.cpu.call.tensors import bias_of, empty_nhwc
from ops.cpu.gemm.convolution import convolved_size
from ops.cpu.gemm.linear import no_pairs, pack_weight
from ops.cpu.gemm.problem import packed_size
from ops.cpu.threads import MACS, threads_for


class DirectConv2d:
    """``activation(conv(x))``.

    Args:
        conv: see :meth:`applies`.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        if not self.applies(conv):
            raise ValueError(
                "conv must be in float32, or bfloat16 with an even number of channels per group, "
                f"without dilation, padded with zeros, got {conv} in {conv.weight.dtype}"
            )
        rows = conv.weight.detach().permute(0, 2, 3, 1).flatten(1).contiguous()
        groups = rows.view(torch.float32).chunk(conv.groups)  # pairs packed like floats
        self._weight = torch.cat([pack_weight(group) for group in groups])
        padding: Any = conv.padding
        self._bias = bias_of(conv)
        self._geometry = [*conv.kernel_size, *conv.stride, *padding, conv.groups]

    @staticmethod
    def applies(conv: nn.Conv2d) -> bool:
        """Whether there is no dilation, and any padding are zeros; bfloat16 needs even groups."""
        if conv.weight.dtype not in (torch.float32, torch.bfloat16):
            return False
        pairs = conv.weight.dtype == torch.float32 or conv.weight.shape[1] % 2 == 0
        zeros = conv.padding_mode == "zeros" and not isinstance(conv.padding, str)
        return pairs and zeros and conv.dilation == (1, 1)

    def __call__(self, x: Tensor, activation: str = "none") -> Tensor:
        """(B, C, H, W) → (B, C', H', W'), channels-last; see :func:`direct_conv2d`."""
        packed = self._weight, self._bias, self._geometry
        out: Tensor = direct_conv2d(x, *packed, activation)
        return out


@kernel("direct", "direct_forward", refuses=no_pairs)
def direct_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor, geometry: Sequence[int], activation: str = "none"
) -> Call:
    """A convolution and an activation. No gradients.

    Args:
        x: (B, C, H, W), float32 or bfloat16; copied unless channels-last.
        weight: the packed weights of the groups, see :class:`DirectConv2d`, for the dtype of ``x``.
        bias: (C',) float32.
        geometry: rows and columns of the kernel, the stride and the padding, then the groups.
        activation: one of :data:`ops.cpu.activations.ACTIVATIONS`.

    Returns:
        (B, C', H', W'), channels-last; sums are in float32.
    """
    require_activation(activation)
    require_dtype(torch.float32, weight=weight, bias=bias)
    *sides, groups = geometry
    kernel_size, stride, padding = sides[:2], sides[2:4], sides[4:]
    channels = x.shape[1] // groups if x.ndim == 4 and x.shape[1] % groups == 0 else 0
    numbers = {torch.float32: 1, torch.bfloat16: 2}.get(x.dtype, 0)  # of a packed float
    inputs = math.prod(kernel_size) * channels // max(1, numbers)
    packed = groups * packed_size(len(bias) // groups, inputs, torch.float32)
    if not numbers or not channels or channels % numbers or weight.numel() != packed:
        raise ValueError(
            "x must be (B, C, H, W) of float32 or bfloat16, with the channels and dtype of the "
            f"weight, got {tuple(x.shape)} of {x.dtype}"
        )
    size = convolved_size(x, kernel_size, stride, padding)
    out = empty_nhwc(x, (len(x), len(bias), *size))

    def arguments() -> dict[str, Any]:
        return {
            **sizes_of(x, "batch channels height width"),
            **{"out_height": size[0], "out_width": size[1], "out_channels": len(bias)},
            **{"kernel": kernel_size, "stride": stride, "padding": padding, "groups": groups},
            "threads": threads_for(out.numel() * channels * math.prod(kernel_size), MACS),
            "in": x.contiguous(memory_format=torch.channels_last),
        }

    return Call(out, arguments)
