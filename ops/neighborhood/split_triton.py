"""The split form of neighborhood attention by Triton kernels (:mod:`ops.neighborhood.triton`).

https://arxiv.org/abs/2204.07143
"""

from __future__ import annotations

from torch import Tensor

from ops.neighborhood import triton
from ops.neighborhood.split_tiled import Window

__all__ = ["mix", "scatter", "scores", "unavailable"]


def unavailable(tensor: Tensor) -> str | None:
    """``None`` if the kernels take queries or values like ``tensor``, else the reason."""
    heads_last = tensor.movedim(1, -2)
    return triton.unavailable(heads_last, heads_last, heads_last)


# The launcher is imported on first use, since triton is optional.
def scores(query: Tensor, key: Tensor, rpb: Tensor | None, fill: float, window: Window) -> Tensor:
    """See :func:`ops.neighborhood.split_tiled.scores`."""
    from ops.neighborhood.triton import split_launch

    return split_launch.scores(query, key, rpb, fill, window)


def mix(weights: Tensor, value: Tensor, window: Window) -> Tensor:
    """See :func:`ops.neighborhood.split_tiled.mix`."""
    from ops.neighborhood.triton import split_launch

    return split_launch.mix(weights, value, window)


def scatter(weights: Tensor, query: Tensor, window: Window) -> Tensor:
    """See :func:`ops.neighborhood.split_tiled.scatter`."""
    from ops.neighborhood.triton import split_launch

    return split_launch.scatter(weights, query, window)
