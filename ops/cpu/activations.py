"""The activations that kernels can fuse."""

from __future__ import annotations

__all__ = ["ACTIVATIONS", "require_activation"]

# In the order of `activation::Kind` in common/activation.h. GELU is the exact one.
ACTIVATIONS = (
    *("none", "relu", "gelu", "silu", "hardswish", "relu6", "sigmoid", "tanh", "squared_relu"),
)


def require_activation(name: str) -> None:
    """Raise an error for activations that kernels cannot apply.

    Raises:
        ValueError: the name is not in :data:`ACTIVATIONS`.
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {ACTIVATIONS}, got {name!r}")
