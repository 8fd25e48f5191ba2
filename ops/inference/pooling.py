"""Inference forms of average pooling."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ops.cpu.call.dispatch import kernels_apply
from ops.cpu.pooling.window_means import window_means

__all__ = ["FastAdaptiveAvgPool2d", "FastGlobalAvgPool2d"]


class FastAdaptiveAvgPool2d(nn.AdaptiveAvgPool2d):
    """(B, C, H, W) → (B, C, *output_size), by our kernel where all windows have one size."""

    def forward(self, x: Tensor) -> Tensor:
        size: Any = self.output_size
        rows, columns = size if isinstance(size, tuple) else (size, size)
        divides = rows and columns and not (x.shape[-2] % rows or x.shape[-1] % columns)
        by_kernel = (
            divides
            and x.ndim == 4
            and x.numel()
            and kernels_apply((x,))
            and not (torch.is_grad_enabled() and x.requires_grad)
            and window_means.unavailable(x.device, x.dtype) is None
        )
        if not by_kernel:
            return super().forward(x)
        window = x.shape[2] // rows, x.shape[3] // columns
        return window_means(x.permute(0, 2, 3, 1), window).permute(0, 3, 1, 2)


class FastGlobalAvgPool2d(FastAdaptiveAvgPool2d):
    """Means of all pixels: (B, C, H, W) → (B, C, 1, 1)."""

    def __init__(self) -> None:
        super().__init__(1)
