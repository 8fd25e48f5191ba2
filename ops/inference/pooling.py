"""The inference form of global pooling."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ops.cpu.call.dispatch import kernels_apply
from ops.cpu.pooling.window_means import window_means

__all__ = ["FastAdaptiveAvgPool2d", "supported"]


def supported(x: Tensor) -> bool:
    """Whether :func:`window_means` can replace torch's functions on ``x``, in any layout."""
    return (
        kernels_apply((x,))
        and not (torch.is_grad_enabled() and x.requires_grad)
        and window_means.unavailable(x.device, x.dtype) is None
    )


class FastAdaptiveAvgPool2d(nn.AdaptiveAvgPool2d):
    """Pooling of windows of one size with our kernel: (B, C, H, W) → (B, C, *output_size)."""

    def forward(self, x: Tensor) -> Tensor:
        size = self.output_size
        rows, columns = size if isinstance(size, tuple) else (size, size)
        if not supported(x) or x.ndim != 4 or not x.numel() or not rows or not columns:
            return super().forward(x)
        height, width = x.shape[2:]
        if height % rows or width % columns:
            return super().forward(x)
        pixels = x.permute(0, 2, 3, 1)
        return window_means(pixels, (height // rows, width // columns)).permute(0, 3, 1, 2)
