"""Convert tensors to the layouts that kernels require."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def dense(t: Tensor | None) -> Tensor | None:
    """A contiguous tensor; None stays None."""
    return None if t is None else t.contiguous()


def dense_channels(t: Tensor) -> Tensor:
    """A tensor with dense last axis; copied if it isn't."""
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def as_nhwc(x: Tensor) -> Tensor:
    """``x``, (B, C, H, W), channels-last; copied if it isn't."""
    if x.stride(1) == 1 or x.shape[1] == 1:
        return x
    return x.contiguous(memory_format=torch.channels_last)


def empty_nhwc(like: Tensor, shape: Sequence[int]) -> Tensor:
    """An uninitialized (B, C, H, W) tensor, channels-last, in the dtype of ``like``."""
    return torch.empty(
        shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last
    )


def bias_of(layer: nn.Linear | nn.Conv2d) -> Tensor:
    """The bias, (out_features,) float32; zeros if the layer has none."""
    if layer.bias is None:
        return layer.weight.new_zeros(len(layer.weight), dtype=torch.float32)
    return layer.bias.detach().float()
