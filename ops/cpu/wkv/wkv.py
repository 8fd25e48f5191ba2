"""Vision-RWKV's scan and its mixtures of pixels, on the CPU.

Bi-WKV (``forward.h``, ``backward.h``), see :mod:`ops.bi_wkv`, is deterministic. The mixtures
(``wkv.cpp``) are for inference.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ops.arguments import require_shapes
from ops.cpu.call.binding import kernel
from ops.cpu.call.c_arguments import Call, sizes_of
from ops.cpu.call.dispatch import require_dtype
from ops.cpu.threads import VALUES, threads_for

_MOST_MIXTURES = 3


@kernel("wkv", "wkv_forward")
def bi_wkv_forward(
    key: Tensor,
    value: Tensor,
    decay: Tensor,
    first: Tensor,
    gate: Tensor | None,
    segments: int,
) -> Call:
    """The scan, multiplied by the sigmoid of an optional gate.

    Args:
        key, value, gate: (B, T, C), float32 or bfloat16.
        decay, first: (C,) float32.
        segments: see :func:`ops.bi_wkv.bi_wkv`; 0 for none.

    Returns:
        (B, T, C), contiguous; sums are in float32.
    """
    _check(key, value, decay, first, segments, gate)
    require_dtype(key.dtype, value=value, gate=gate)
    return Call(key.new_empty(key.shape), lambda: _sizes(key, segments))


@kernel("wkv", "wkv_backward", returns=4)
def bi_wkv_backward(
    grad_out: Tensor,
    key: Tensor,
    value: Tensor,
    decay: Tensor,
    first: Tensor,
    segments: int,
) -> Call:
    """Gradients of key and value, (B, T, C), and of decay and first per image, (B, C).

    All are float32; see :func:`bi_wkv_forward`.
    """
    _check(key, value, decay, first, segments, grad_out)
    require_dtype(torch.float32, grad_out=grad_out, key=key, value=value)
    of_image = (key.shape[0], key.shape[2])
    grads = (
        *(key.new_empty(key.shape), key.new_empty(key.shape)),
        *(key.new_empty(of_image), key.new_empty(of_image)),
    )

    def arguments() -> dict[str, Any]:
        names = ("grad_key", "grad_value", "grad_decay", "grad_first")
        return {**_sizes(key, segments), **dict(zip(names, grads, strict=True))}

    return Call(grads, arguments)


def _check(
    key: Tensor, value: Tensor, decay: Tensor, first: Tensor, segments: int, other: Tensor | None
) -> None:
    axes = "batch tokens dim"
    others = {"gate or gradient": (other, axes), "decay": (decay, "dim"), "first": (first, "dim")}
    require_shapes(key=(key, axes), value=(value, axes), **others)
    if segments < 0:
        raise ValueError(f"segments must be 0 or more, got {segments}")
    require_dtype(torch.float32, decay=decay, first=first)


def _sizes(key: Tensor, segments: int) -> dict[str, int]:
    return {
        **sizes_of(key, "batch tokens dim"),
        "length": -(-key.shape[1] // segments) if segments else 0,
        # An exponential and some thirty multiply-adds per value.
        "threads": threads_for(8 * key.numel(), VALUES),
    }


@kernel("wkv", "wkv_shifted_mixtures", large_results=True)
def shifted_mixtures(x: Tensor, shares: Tensor, groups: int = 1) -> Call:
    """``x * share + shifted * (1 - share)`` for each row of ``shares``. No gradients.

    In each run of channels of ``shifted``, one quarter each comes from the left, right, upper and
    lower neighbour; zeros beyond the border.

    Args:
        x: (B, H, W, C), float32 or bfloat16.
        shares: (1 … 3, C) float32.
        groups: runs of channels; 4 · groups divides C.

    Returns:
        (rows, B, H, W, C), contiguous.
    """
    sizes = require_shapes(x=(x, "batch height width dim"), shares=(shares, "mixtures dim"))
    if not 1 <= len(shares) <= _MOST_MIXTURES:
        raise ValueError(f"shares must have 1 … {_MOST_MIXTURES} rows, got {len(shares)}")
    if groups < 1 or x.shape[3] % (4 * groups):
        raise ValueError(f"4 · groups must divide {x.shape[3]} channels, got groups {groups}")
    require_dtype(torch.float32, shares=shares)

    result = x.new_empty(len(shares), *x.shape)
    return Call(result, lambda: {**sizes, "threads": threads_for(x.numel(), VALUES)})
