"""Large kernel attention: a gate from a decomposed 21×21 depthwise convolution.

Of the Visual Attention Network, https://arxiv.org/abs/2202.09741.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["DilatedDepthwiseConv2d", "LargeKernelAttention"]


class DilatedDepthwiseConv2d(nn.Conv2d):
    """A dilated depthwise convolution that preserves the map's size.

    (B, dim, H, W) → (B, dim, H, W). CPUs lack fast kernels for wide ones (7×7, dilation 3).
    Therefore, the pixels at every ``dilation``-th row and column are treated as a separate map and
    convolved without dilation, except on small maps, where the padding costs more than it saves.

    Args:
        dim: channels.
        kernel_size: odd.
        dilation: distance between taps in pixels.
    """

    def __init__(self, dim: int, kernel_size: int, dilation: int) -> None:
        reach = dilation * (kernel_size // 2)
        super().__init__(dim, dim, kernel_size, padding=reach, dilation=dilation, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        step, kernel_size = self.dilation[0], self.kernel_size[0]
        if (
            x.is_cpu
            and not (torch.compiler.is_compiling() or torch.jit.is_tracing())
            and x.is_contiguous()
            and min(x.shape[2:]) >= 2 * kernel_size
        ):
            maps = F.conv2d(
                _split_phases(x, step),
                self.weight,
                self.bias,
                padding=kernel_size // 2,
                groups=self.groups,
            )
            return _join_phases(maps, step, x.shape)
        return super().forward(x)


def _split_phases(x: Tensor, step: int) -> Tensor:
    """(B, C, H, W) → (B · step², C, ⌈H / step⌉, ⌈W / step⌉), padded with zeros."""
    batch, dim, height, width = x.shape
    rows, columns = -(-height // step), -(-width // step)
    x = F.pad(x, (0, columns * step - width, 0, rows * step - height))
    x = x.reshape(batch, dim, rows, step, columns, step).permute(0, 3, 5, 1, 2, 4)
    return x.reshape(-1, dim, rows, columns)


def _join_phases(maps: Tensor, step: int, shape: torch.Size) -> Tensor:
    """Undo :func:`_split_phases`, to a map of ``shape``."""
    batch, dim, height, width = shape
    rows, columns = maps.shape[2:]
    x = maps.reshape(batch, step, step, dim, rows, columns).permute(0, 3, 4, 1, 5, 2)
    return x.reshape(batch, dim, rows * step, columns * step)[:, :, :height, :width].contiguous()


class LargeKernelAttention(nn.Module):
    """``x * pw(dw_dilated(dw(x)))``: (B, dim, H, W) → (B, dim, H, W).

    With the defaults, a 5×5 depthwise convolution, a 7×7 one with dilation 3 and a pointwise one
    cover 23×23 pixels; their output gates the input.
    """

    def __init__(
        self, dim: int, kernel_size: int = 5, dilated_kernel_size: int = 7, dilation: int = 3
    ) -> None:
        super().__init__()
        self.dw = nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim)
        self.dw_dilated = DilatedDepthwiseConv2d(dim, dilated_kernel_size, dilation)
        self.pw = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.pw(self.dw_dilated(self.dw(x)))
