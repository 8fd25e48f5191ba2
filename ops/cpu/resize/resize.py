"""Resize part of an 8-bit image on the CPU, equal to Pillow's resizing to the last bit.

Evaluation resizes an image and keeps its centre. Pillow computes all pixels, with scalar code; the
kernel computes those that are kept, with vectors. Pillow's algorithm is a sum of the
pixels within a filter's support, which grows with the scale, first along rows and then along
columns. Weights are rounded to 22 fractional bits, and sums to 8-bit integers.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from ops.cpu.build import load, unavailable_reason
from ops.cpu.call.structures import structure

_PROBLEM, _TENSORS = (
    structure("resize/resize.cpp", f"resize::{n}") for n in ("Problem", "Tensors")
)
_PRECISION = 22


def _bilinear(x: np.ndarray) -> np.ndarray:
    return np.maximum(1 - np.abs(x), 0)


def _bicubic(x: np.ndarray) -> np.ndarray:
    # In the order of Pillow's operations, as rounding depends on it.
    x, a = np.abs(x), -0.5
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1, near, np.where(x < 2, far, 0))


FILTERS: dict[str, tuple[Callable[[np.ndarray], np.ndarray], float]] = {
    "bilinear": (_bilinear, 1.0),
    "bicubic": (_bicubic, 2.0),
}
"""The filters, and how far they reach at scale 1."""
MOST_SCALE = 400
"""The most times that an image can be shrunk: sums of the weights' low halves fit 31 bits."""


def unavailable() -> str | None:
    """``None`` if the kernel is available, else the reason; the first call may compile it."""
    return unavailable_reason("resize")


def resize_part(
    pixels: np.ndarray, size: tuple[int, int], box: tuple[int, int, int, int], filter: str
) -> np.ndarray:
    """Part of an image resized as ``PIL.Image.resize`` does.

    Args:
        pixels: (H, W, C), uint8; copied unless contiguous.
        size: height and width that the whole image is resized to.
        box: top, left, height and width of the part, within ``size``.
        filter: one of :data:`FILTERS`.

    Returns:
        (C, height, width), uint8.

    Raises:
        ValueError: an array of another kind, an empty or outlying part, an unknown filter, or an
            image that is shrunk more than :data:`MOST_SCALE` times.
        RuntimeError: the kernel is not available here (check :func:`unavailable` first).
        MemoryError: the scratch buffers cannot be allocated.
    """
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or not pixels.size:
        raise ValueError(
            f"pixels must be (H, W, C) of uint8 and not empty, got {pixels.shape} of {pixels.dtype}"
        )
    top, left, height, width = box
    inside = min(top, left) >= 0 and top + height <= size[0] and left + width <= size[1]
    if not inside or min(height, width) < 1:
        raise ValueError(f"box must be a part of {size[0]}×{size[1]} pixels, got {box}")
    if filter not in FILTERS:
        raise ValueError(f"filter must be {' or '.join(FILTERS)}, got {filter!r}")
    pixels = np.ascontiguousarray(pixels)
    _, first_x, weights_x = _axis(pixels.shape[1], size[1], left, width, filter)
    rows, first_y, weights_y = _axis(pixels.shape[0], size[0], top, height, filter)
    problem = _PROBLEM(*pixels.shape, height, width, weights_x.shape[1], weights_y.shape[1], *rows)
    out = np.empty((pixels.shape[2], height, width), np.uint8)
    arrays = (pixels, first_x, weights_x, first_y, weights_y, out)
    _call("resize_forward", problem, _TENSORS(*(array.ctypes.data for array in arrays)))
    return out


def look_up(images: np.ndarray, tables: np.ndarray) -> np.ndarray:
    """Replace values by entries of a table per channel, for example by normalised values.

    Args:
        images: (B, C, H, W), uint8.
        tables: (C, 256), float32.

    Returns:
        (B, C, H, W), float32.

    Raises:
        ValueError: mismatched shapes or dtypes.
        RuntimeError: the kernel is not available here (check :func:`unavailable` first).
    """
    if images.dtype != np.uint8 or images.ndim != 4:
        raise ValueError(
            f"images must be (B, C, H, W) of uint8, got {images.shape} of {images.dtype}"
        )
    batch, channels, height, width = images.shape
    if tables.dtype != np.float32 or tables.shape != (channels, 256):
        raise ValueError(
            f"tables must be ({channels}, 256) of float32, got {tables.shape} of {tables.dtype}"
        )
    out = np.empty(images.shape, np.float32)
    arrays = np.ascontiguousarray(images), np.ascontiguousarray(tables), out
    _call("resize_look_up", *map(ctypes.c_int64, (batch, channels, height * width)), *arrays)
    return out


@functools.lru_cache(maxsize=256)
def _axis(
    size: int, new_size: int, first: int, count: int, filter: str
) -> tuple[tuple[int, int], np.ndarray, np.ndarray]:
    """The inputs of ``count`` outputs from ``first`` on, when ``size`` pixels become ``new_size``.

    Returns:
        The first pixel and the number of pixels of all; each output's first pixel (count,) and
        weights (count, taps), int32, with zeros past the end.
    """
    function, reach = FILTERS[filter]
    scale = size / new_size
    stretch = max(scale, 1.0)
    support = reach * stretch
    taps = int(np.ceil(support)) * 2 + 1
    if scale > MOST_SCALE:
        raise ValueError(f"{size} pixels cannot be shrunk to {new_size}: at most {MOST_SCALE} to 1")
    # Each step in double precision and in Pillow's order: a last bit may change a rounded weight.
    centres = (np.arange(first, first + count) + 0.5) * scale
    starts = np.maximum((centres - support + 0.5).astype(np.int64), 0)
    ends = np.minimum((centres + support + 0.5).astype(np.int64), size)
    places = starts[:, None] + np.arange(taps)
    weights = function((places - centres[:, None] + 0.5) * (1.0 / stretch))
    weights[places >= ends[:, None]] = 0
    total = np.cumsum(weights, axis=1)[:, -1:]
    weights = np.where(total != 0, weights / np.where(total != 0, total, 1), weights)
    fixed = np.trunc(np.where(weights < 0, -0.5, 0.5) + weights * (1 << _PRECISION))
    low, high = int(starts.min()), int(ends.max())
    return (low, high - low), starts.astype(np.int32), fixed.astype(np.int32)


def _call(function: str, *arguments: Any) -> None:
    """Call the C function; arrays are passed by address."""
    library = load("resize")
    if library is None:
        raise RuntimeError(f"the kernel resize is not available: {unavailable()}")
    packed: list[Any] = []
    for argument in arguments:
        if isinstance(argument, np.ndarray):
            packed.append(ctypes.c_void_p(argument.ctypes.data))
        elif isinstance(argument, ctypes.Structure):
            packed.append(ctypes.byref(argument))
        else:
            packed.append(argument)
    if getattr(library, function)(*packed):
        raise MemoryError("no memory for the scratch buffers of resize")
