"""The split form of neighborhood attention by compiled kernels (:mod:`ops.cpu.neighborhood`).

https://arxiv.org/abs/2204.07143. float32 and bfloat16, and float16 computed in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ops.cpu.neighborhood.attention import na_cpu_mix, na_cpu_scatter, na_cpu_scores
from ops.neighborhood import cpu
from ops.neighborhood.split_tiled import Window

__all__ = ["mix", "scatter", "scores", "unavailable"]


def unavailable(tensor: Tensor) -> str | None:
    """``None`` if the kernels take queries or values like ``tensor``, else the reason."""
    if tensor.dtype == torch.float16:
        tensor = tensor[:0].float()
    return cpu.unavailable(tensor, tensor, tensor)


def scores(query: Tensor, key: Tensor, rpb: Tensor | None, fill: float, window: Window) -> Tensor:
    """See :func:`ops.neighborhood.split_tiled.scores`."""
    out: Tensor = na_cpu_scores(_kernels(query), _kernels(key), rpb, fill, *window)
    return out.to(query.dtype)


def mix(weights: Tensor, value: Tensor, window: Window) -> Tensor:
    """See :func:`ops.neighborhood.split_tiled.mix`."""
    out: Tensor = na_cpu_mix(_kernels(weights), _kernels(value), *window)
    return out.to(value.dtype)


def scatter(weights: Tensor, query: Tensor, window: Window) -> Tensor:
    """See :func:`ops.neighborhood.split_tiled.scatter`."""
    out: Tensor = na_cpu_scatter(_kernels(weights), _kernels(query), *window)
    return out.to(query.dtype)


def _kernels(tensor: Tensor) -> Tensor:
    """In a dtype that the kernels take."""
    return tensor.float() if tensor.dtype == torch.float16 else tensor
