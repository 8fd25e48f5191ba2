"""Weight initialisation shared by several families; pass it to ``model.apply``."""

from __future__ import annotations

import math

from timm.layers import trunc_normal_
from torch import Tensor, nn

from ops.arguments import checked

__all__ = ["init_fan_out", "init_linear", "init_trunc_normal", "trunc_normal"]


@checked()
def trunc_normal(tensor: Tensor, std: float = 0.02) -> None:
    """Fill with a normal distribution, truncated at five standard deviations.

    timm's truncation at ±2 is a hundred standard deviations away, and one sample in sixteen million
    is exactly −2, among weights of about 0.02.

    Raises:
        ValueError: ``std`` is not positive.
    """
    if not std > 0:
        raise ValueError(f"std must be above 0, got {std}")
    trunc_normal_(tensor, std=std, a=-5 * std, b=5 * std)


def _zero_bias(module: nn.Conv2d | nn.Linear) -> None:
    if module.bias is not None:
        nn.init.zeros_(module.bias)


@checked()
def init_fan_out(module: nn.Module) -> None:
    """Linear layers truncated normal (std 0.02), convolutions normal with variance 2 / fan-out."""
    if isinstance(module, nn.Linear):
        trunc_normal(module.weight)
        _zero_bias(module)
    elif isinstance(module, nn.Conv2d):
        fan_out = module.out_channels * math.prod(module.kernel_size) / module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
        _zero_bias(module)


@checked()
def init_trunc_normal(module: nn.Module) -> None:
    """Linear layers and convolutions truncated normal (std 0.02), biases zero."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        trunc_normal(module.weight)
        _zero_bias(module)


@checked()
def init_linear(module: nn.Module) -> None:
    """Linear layers truncated normal (std 0.02), biases zero; convolutions as in PyTorch."""
    if isinstance(module, nn.Linear):
        trunc_normal(module.weight)
        _zero_bias(module)
