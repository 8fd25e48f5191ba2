"""The activations that kernels apply to what they compute."""

from __future__ import annotations

__all__ = ["ACTIVATIONS", "require_activation"]

# The order is that of `activation::Kind` in common/activation.h. GELU is the exact one.
ACTIVATIONS = ("none", "relu", "gelu", "silu", "hardswish", "relu6")


def require_activation(name: str) -> None:
    """Refuse what kernels do not apply.

    Raises:
        ValueError: another name.
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {ACTIVATIONS}, got {name!r}")
