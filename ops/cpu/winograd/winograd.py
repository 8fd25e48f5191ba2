"""3×3 convolutions on the CPU for inference, by Winograd's minimal filtering.

The kernel (``winograd.cpp``) multiplies 4/9 as much as other convolutions, in float32. A NaN or an
infinity reaches all outputs of the 2×2 pixels of which one sees it.
https://arxiv.org/abs/1509.09308
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ops.cpu.activations import require_activation
from ops.cpu.call.binding import kernel
from ops.cpu.call.c_arguments import Call, sizes_of
from ops.cpu.call.dispatch import require_dtype
from ops.cpu.call.tensors import as_nhwc, bias_of, empty_nhwc
from ops.cpu.gemm.convolution import convolved_size
from ops.cpu.gemm.linear import no_products, pack_weight
from ops.cpu.gemm.problem import packed_size
from ops.cpu.threads import MACS, threads_for

_SIDE, _POINTS = 3, 16
_TRANSFORM = ((1.0, 0.0, 0.0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0.0, 0.0, 1.0))


class WinogradConv2d:
    """``activation(conv(x))``.

    Args:
        conv: see :meth:`applies`, in float32.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        if not self.applies(conv) or conv.weight.dtype != torch.float32:
            raise ValueError(
                "conv must be a 3×3 in float32 without stride and dilation, padded with "
                f"zeros, got {conv} in {conv.weight.dtype}"
            )
        transform = torch.tensor(_TRANSFORM, dtype=torch.float64)
        weight = transform @ conv.weight.detach().double() @ transform.t()  # (out, in, 4, 4)
        groups = weight.float().flatten(2).chunk(conv.groups)
        points = [point for group in groups for point in group.unbind(2)]
        self._weight = torch.cat([pack_weight(point) for point in points])
        self._bias, self._padding, self._groups = bias_of(conv), list(conv.padding), conv.groups

    @staticmethod
    def applies(conv: nn.Conv2d) -> bool:
        """Whether ``conv`` is a 3×3 without stride and dilation, padded with zeros."""
        simple = conv.stride == conv.dilation == (1, 1)
        zeros = conv.padding_mode == "zeros" and not isinstance(conv.padding, str)
        return simple and zeros and conv.kernel_size == (_SIDE, _SIDE)

    def __call__(self, x: Tensor, activation: str = "none") -> Tensor:
        """(B, C, H, W) → (B, C', H', W'), channels-last; see :func:`winograd_conv2d`."""
        packed = self._weight, self._bias, self._padding
        out: Tensor = winograd_conv2d(x, *packed, activation, self._groups)
        return out


@kernel("winograd", "winograd_forward", refuses=no_products)
def winograd_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    padding: Sequence[int],
    activation: str = "none",
    groups: int = 1,
) -> Call:
    """A 3×3 convolution and an activation. No gradients.

    Args:
        x: (B, C, H, W) float32; copied unless channels-last.
        weight: the packed weights of the 16 points of each group, see :class:`WinogradConv2d`.
        bias: (C',) float32.
        padding: zeros on both sides of rows and columns.
        activation: one of :data:`ops.cpu.activations.ACTIVATIONS`.
        groups: of channels.

    Returns:
        (B, C', H', W'), channels-last.
    """
    require_activation(activation)
    require_dtype(torch.float32, x=x, weight=weight, bias=bias)
    channels = 0 if x.ndim != 4 else x.shape[1]
    sizes = len(bias) // groups, channels // groups
    if channels % groups or weight.numel() != _POINTS * groups * packed_size(*sizes, x.dtype):
        raise ValueError(
            f"x must be (B, C, H, W) with the channels of the weight, got {tuple(x.shape)}"
        )
    size = convolved_size(x, (_SIDE, _SIDE), (1, 1), padding)
    out = empty_nhwc(x, (len(x), len(bias), *size))

    def arguments() -> dict[str, Any]:
        return {
            **sizes_of(x, "batch channels height width"),
            **{"out_height": size[0], "out_width": size[1], "out_channels": len(bias)},
            "threads": threads_for(out.numel() * sizes[1] * _SIDE**2, MACS),
            "in": as_nhwc(x).contiguous(memory_format=torch.channels_last),
        }

    return Call(out, arguments)
