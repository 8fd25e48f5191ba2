"""Bicubic resizing with MATLAB's antialiased kernel, as used in restoration papers.

Robert G. Keys, "Cubic convolution interpolation for digital image processing" (1981), a = -1/2.
When reducing an image, MATLAB's ``imresize`` widens the kernel by the same factor; it mirrors the
image at its edges, repeating the edge itself. Neither Pillow nor ``F.interpolate`` does both.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def cubic(x: Tensor) -> Tensor:
    """Keys' kernel: 1 at 0, 0 at the other integers and beyond 2."""
    x = x.abs()
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x <= 1, near, torch.where(x < 2, far, torch.zeros_like(x)))


def axis_weights(
    size: int, scale: float, start: int, stop: int, antialias: bool = True
) -> tuple[Tensor, Tensor]:
    """Source pixels and weights of the pixels ``start … stop - 1`` of the resized side.

    Args:
        size: original size of the side.
        scale: new size relative to the original.
        antialias: widen the kernel when reducing.

    Returns:
        int64 indices and float64 weights, (stop - start, taps); weights add up to 1.
    """
    shrink = min(scale, 1.0) if antialias else 1.0
    width = 4 / shrink
    centres = (torch.arange(start, stop, dtype=torch.float64) + 0.5) / scale - 0.5
    first = (centres - width / 2).floor()
    places = first[:, None] + torch.arange(math.ceil(width) + 2)
    weights = cubic((centres[:, None] - places) * shrink)
    weights = weights / weights.sum(1, keepdim=True)
    mirrored = places.long().remainder(2 * size)
    return torch.minimum(mirrored, 2 * size - 1 - mirrored), weights


def resize_bicubic(
    x: Tensor,
    scale: float | None = None,
    *,
    size: tuple[int, int] | None = None,
    window: tuple[int, int, int, int] | None = None,
    antialias: bool = True,
) -> Tensor:
    """Resize images like MATLAB's ``imresize``, without rounding or clipping.

    Args:
        x: (…, H, W), of a floating type.
        scale: the result has ⌈H · scale⌉ × ⌈W · scale⌉ pixels.
        size: the size of the result, as an alternative.
        window: top, left, bottom and right of the part of the result to compute; it exactly
            equals that part of the whole result.
        antialias: like MATLAB's ``Antialiasing``.

    Returns:
        (…, H', W').
    """
    if (scale is None) == (size is None):
        raise ValueError(f"give either scale or size, got {scale} and {size}")
    sides = x.shape[-2:]
    if scale is not None:
        if scale <= 0:
            raise ValueError(f"scale must be positive, got {scale}")
        # 3 · (1/3) must not become 2 pixels because of a rounding error.
        size = (math.ceil(sides[0] * scale - 1e-9), math.ceil(sides[1] * scale - 1e-9))
        scales = (scale, scale)
    else:
        assert size is not None
        scales = (size[0] / max(sides[0], 1), size[1] / max(sides[1], 1))
    if min(*sides, *size) < 1:
        raise ValueError(f"cannot resize {sides[0]}×{sides[1]} to {size[0]}×{size[1]}")
    top, left, bottom, right = window or (0, 0, *size)
    if not (0 <= top < bottom <= size[0] and 0 <= left < right <= size[1]):
        raise ValueError(f"window {window} exceeds the result of {size[0]}×{size[1]}")
    for axis, start, stop in ((-2, top, bottom), (-1, left, right)):
        x = _resize_axis(x, axis, scales[axis], start, stop, antialias)
    return x


def _resize_axis(
    x: Tensor, axis: int, scale: float, start: int, stop: int, antialias: bool
) -> Tensor:
    places, weights = axis_weights(x.shape[axis], scale, start, stop, antialias)
    places, weights = places.to(x.device), weights.to(x)
    if axis == -2:
        weights = weights.unsqueeze(-1)  # (rows, taps, 1)
    out: Tensor | None = None
    for tap in range(places.shape[1]):
        part = x.index_select(axis, places[:, tap]) * weights[:, tap]
        out = part if out is None else out + part
    assert out is not None
    return out
