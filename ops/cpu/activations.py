"""The activations that kernels apply to what they compute."""

from __future__ import annotations

__all__ = ["ACTIVATIONS"]

# The order is that of `activation::Kind` in common/activation.h. GELU is the exact one.
ACTIVATIONS = ("none", "relu", "gelu", "silu", "hardswish", "relu6")
