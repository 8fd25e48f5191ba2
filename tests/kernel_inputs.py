"""What the tests of compiled kernels share: inputs, and the activations as torch computes them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# By the names of ops.depthwise.ACTIVATIONS.
PLAIN_ACTIVATIONS = {
    "none": lambda x: x,
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "hardswish": F.hardswish,
}


def random(*shape: int, seed: int = 0) -> Tensor:
    """Normally distributed, float64."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
