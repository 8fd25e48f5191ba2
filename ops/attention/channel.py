"""Efficient channel attention: a gate for each channel from the means of its neighbours.

Qilong Wang et al., "ECA-Net: Efficient Channel Attention for Deep Convolutional Neural Networks",
https://arxiv.org/abs/1910.03151.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["EfficientChannelAttention"]


class EfficientChannelAttention(nn.Module):
    """Multiplies each channel by the sigmoid of a short convolution over the channels' means.

    (B, C, H, W) → (B, C, H, W), for any number of channels. The convolution is in float32 or more.

    Raises:
        ValueError: an even ``kernel_size``.
    """

    def __init__(self, kernel_size: int = 3) -> None:
        super().__init__()
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {kernel_size}")
        self.conv = nn.Conv1d(1, 1, kernel_size, padding=kernel_size // 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        means, weight = x.mean((2, 3)), self.conv.weight
        dtype = torch.promote_types(x.dtype, torch.float32)
        gates = F.conv1d(means[:, None].to(dtype), weight.to(dtype), padding=weight.shape[2] // 2)
        return x * gates[:, 0, :, None, None].sigmoid().to(x.dtype)
