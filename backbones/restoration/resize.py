"""Bicubic resizing like MATLAB's ``imresize``, as used in restoration papers.

Robert G. Keys, "Cubic convolution interpolation for digital image processing" (1981), a = -1/2.
torch's antialiased bicubic has this kernel, and widens it when reducing, but cuts it off at the
edges of the image, where MATLAB mirrors the image, repeating the edge itself.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

_REACH = 3  # pixels of the smaller image; the kernel reaches two and a half


def resize_bicubic(x: Tensor, scale: float) -> Tensor:
    """Enlarge or reduce images, without rounding or clipping.

    (…, H, W), of a floating type → (…, ⌈H · scale⌉, ⌈W · scale⌉). ``scale`` is an integer, or 1
    divided by one.
    """
    factor = round(max(scale, 1 / scale)) if scale > 0 else 0
    if factor == 0 or not math.isclose(scale, factor if scale >= 1 else 1 / factor):
        raise ValueError(f"scale must be an integer or 1 divided by one, got {scale}")
    margin = _REACH if scale >= 1 else _REACH * factor
    padded = x.double().reshape(-1, 1, *x.shape[-2:])  # places on long sides need its precision
    for axis in (2, 3):
        size = x.shape[axis - 4]
        end = size + margin if scale >= 1 else math.ceil(size / factor) * factor + margin
        places = torch.arange(-margin, end, device=x.device).remainder(2 * size)
        padded = padded.index_select(axis, torch.minimum(places, 2 * size - 1 - places))
    sides = [round(side * scale) for side in padded.shape[2:]]
    large = F.interpolate(padded, sides, mode="bicubic", antialias=True)
    cut = round(margin * scale)
    inner = large[:, :, cut : sides[0] - cut, cut : sides[1] - cut]
    return inner.reshape(*x.shape[:-2], *inner.shape[2:]).to(x.dtype)
