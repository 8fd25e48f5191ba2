"""Large kernel attention: a gate from a decomposed 21×21 depthwise convolution.

Of the Visual Attention Network, https://arxiv.org/abs/2202.09741.
"""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["LargeKernelAttention"]


class LargeKernelAttention(nn.Module):
    """``x * pw(dw_dilated(dw(x)))``: (B, dim, H, W) → (B, dim, H, W).

    A ``kernel_size`` 5 depthwise convolution, one of ``dilated_kernel_size`` 7 at ``dilation`` 3
    and a pointwise one together see 23×23 pixels; their product with the input is the attention.
    """

    def __init__(
        self, dim: int, kernel_size: int = 5, dilated_kernel_size: int = 7, dilation: int = 3
    ) -> None:
        super().__init__()
        reach = dilation * (dilated_kernel_size - 1) // 2
        self.dw = nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim)
        self.dw_dilated = nn.Conv2d(
            dim, dim, dilated_kernel_size, padding=reach, dilation=dilation, groups=dim
        )
        self.pw = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.pw(self.dw_dilated(self.dw(x)))
