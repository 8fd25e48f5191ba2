"""Launching the Triton kernels of split neighborhood attention.

https://arxiv.org/abs/2204.07143. Tensors are heads first, see :mod:`ops.neighborhood.split`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ops.neighborhood.split_tiled import Window
from ops.neighborhood.triton.launch import _precision, _run_tiles, _strides, _triple
from ops.neighborhood.triton.split import mix_kernel, scatter_kernel, scores_kernel
from ops.neighborhood.triton.tiles import padded


def scores(query: Tensor, key: Tensor, rpb: Tensor | None, fill: float, window: Window) -> Tensor:
    """See :func:`ops.neighborhood.split_tiled.scores`."""
    shape = (*query.shape[:-1], math.prod(window[0]))
    # Windows without causal axes are full.
    out = query.new_full(shape, fill) if any(window[2]) else query.new_empty(shape)
    bias = {"bias_ptr": None if rpb is None else rpb.contiguous(), "HAS_BIAS": rpb is not None}
    _run(scores_kernel, query, key, out, window, bias)
    return out


def mix(weights: Tensor, value: Tensor, window: Window) -> Tensor:
    """See :func:`ops.neighborhood.split_tiled.mix`."""
    out = value.new_empty(value.shape)
    _run(mix_kernel, out, value, weights, window)
    return out


def scatter(weights: Tensor, query: Tensor, window: Window) -> Tensor:
    """See :func:`ops.neighborhood.split_tiled.scatter`."""
    out = query.new_empty(query.shape)
    _run(scatter_kernel, query, out, weights, window)
    return out


def _run(
    kernel: Any,
    query: Tensor,
    key: Tensor,
    weights: Tensor,
    window: Window,
    more: dict[str, Any] | None = None,
) -> None:
    rank = query.dim() - 3
    kernel_size, dilation, is_causal = window

    def strides(tensor: Tensor) -> tuple[int, ...]:
        return _strides(tensor.movedim(1, -2), rank)

    arguments = {
        "q_ptr": query,
        "k_ptr": key,
        "w_ptr": weights,
        "q_strides": strides(query),
        "k_strides": strides(key),
        "w_strides": strides(weights),
        "size": _triple(query.shape[2:-1], 1),
        "heads": query.shape[1],
        "RANK": rank,
        "KERNEL": _triple(kernel_size, 1),
        "STRIDE": (1, 1, 1),
        "DILATION": _triple(dilation, 1),
        "CAUSAL": _triple(is_causal, False),
        "DIM": query.shape[-1],
        "PADDED_DIM": padded(query.shape[-1]),
        "PRECISION": _precision(),
        **(more or {}),
    }
    with torch.cuda.device_of(query):
        _run_tiles(kernel, query.shape[0] * query.shape[1], arguments)
