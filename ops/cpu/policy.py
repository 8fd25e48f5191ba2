"""The one place that decides: which kernel computes a layer, ours, oneDNN's or torch's.

Every rule is a function of dtype, sizes and :mod:`ops.cpu.instruction_sets`; nothing else
asks what the hardware is, so that ``VISION_BACKBONES_NATIVE_ISA`` decides as a plainer CPU does.
Docstrings say why, and what was measured. To measure a rule again, run the models that it concerns
with both answers, in turns::

    python tools/benchmark.py --models shvit_s4 --batches 1 8 --modes fused

While :func:`explaining`, the rules that were asked are noted.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch

from ops.cpu.instruction_sets import instruction_set

__all__ = [
    "Asked",
    "averages_in_linear",
    "by_tiles",
    "channels_enough_for_windows",
    "computed_in",
    "conv_by_kernel",
    "depthwise_by_kernel",
    "explaining",
    "feed_forward_by_kernel",
    "few_rows",
    "linear_by_kernel",
    "multiplies",
    "rotated_attention_by_kernel",
    "single_head_by_kernel",
    "softmax_attention_by_kernel",
    "window_attention_by_kernel",
]


class Asked(NamedTuple):
    """A rule, by its name, that was asked, and what it said."""

    rule: str
    arguments: tuple[Any, ...]
    answer: Any


class _Thread(threading.local):
    asked: list[Asked] | None = None


_thread = _Thread()
P = ParamSpec("P")
R = TypeVar("R")


@contextmanager
def explaining() -> Iterator[list[Asked]]:
    """Inside, the rules that this thread asks are appended to the list."""
    before, _thread.asked = _thread.asked, []
    try:
        yield _thread.asked
    finally:
        _thread.asked = before


def _rule(function: Callable[P, R]) -> Callable[P, R]:
    @functools.wraps(function)
    def asked(*args: P.args, **kwargs: P.kwargs) -> R:
        answer = function(*args, **kwargs)
        if _thread.asked is not None:
            _thread.asked.append(Asked(function.__name__, (*args, *kwargs.values()), answer))
        return answer

    return asked


# -- what the CPU multiplies ---------------------------------------------------------------------


def multiplies(dtype: torch.dtype) -> bool:
    """Whether torch's layers have products of ``dtype``, float32 or bfloat16, on this CPU.

    Without, oneDNN refuses bfloat16 or takes many times as long as for float32 (EfficientViT on
    AVX2 took 398 ms, and 12 ms in float32).
    """
    return dtype != torch.bfloat16 or (
        _has_bfloat16() and instruction_set() not in ("avx512", "avx2", "neon")
    )


@functools.cache
def _has_bfloat16() -> bool:
    return bool(
        torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def computed_in(dtype: torch.dtype) -> torch.dtype:
    """What oneDNN is to multiply: float32 for what the CPU does not multiply."""
    return dtype if multiplies(dtype) else torch.float32


def by_tiles(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies ``dtype`` in tiles (AMX), which not all of our kernels do."""
    return dtype == torch.bfloat16 and instruction_set() == "amx"


# -- linear layers -------------------------------------------------------------------------------

# With tiles, and without instructions that the kernel was written for, oneDNN catches up; so it may
# on ARM, where nothing was measured.
_FEW_ROWS = {"amx": 2048, "neonbf16": 2048, "neon": 2048, "portable": 2048}
_FEW_ROWS_OF_TILES = 512
_NARROW = 32


def few_rows(dtype: torch.dtype) -> int:
    """Up to how many rows our linear kernel, which prefetches weights, is faster than oneDNN's.

    With AVX2 and AVX-512 for any number, since it prefetches what it will write: 0.99 to 1.02 of
    oneDNN's time in ten models at eight images, 1.15 times as fast in MedViTV2 at 1024×1024.
    """
    if by_tiles(dtype):
        return _FEW_ROWS_OF_TILES
    return _FEW_ROWS.get(instruction_set(), sys.maxsize)


@_rule
def linear_by_kernel(
    rows: int, in_features: int, out_features: int, dtype: torch.dtype, activation: str
) -> bool:
    """Our linear kernel: few rows, few features, or a GELU that oneDNN computes in bfloat16.

    Also where torch does not multiply ``dtype``.
    """
    if not multiplies(dtype) or rows <= few_rows(dtype):
        return True
    return min(in_features, out_features) <= _NARROW or (
        activation == "gelu" and dtype == torch.bfloat16
    )


@_rule
def feed_forward_by_kernel(dtype: torch.dtype) -> bool:
    """Two linear layers in one pass; with AMX, those of bfloat16 were measured one by one only."""
    return not by_tiles(dtype)


# -- convolutions --------------------------------------------------------------------------------

# Of fewer channels windows take long to copy. Maps of so few are images, in NCHW.
_FEWEST_CHANNELS = 16
# From this many taps on, or with other than square, dense windows, our kernel is the faster one.
_LARGE_WINDOW = 49
# So it is for maps of up to so many values: oneDNN takes longer to be called.
_SMALL_MAP = 1 << 17
_VECTOR = 16  # floats, at most


def channels_enough_for_windows(in_channels: int) -> bool:
    """Whether windows are copied and multiplied, rather than read from an image in NCHW."""
    return in_channels >= _FEWEST_CHANNELS


@_rule
def conv_by_kernel(in_channels: int, pixels: int, is_nchw: bool, dtype: torch.dtype) -> bool:
    """Our strided convolution: images that lie in NCHW, and few enough pixels (see few_rows).

    1.3 to 2 times as fast as oneDNN's in the first layers of all families.
    """
    if not channels_enough_for_windows(in_channels):
        return is_nchw
    return pixels <= few_rows(dtype)


@_rule
def depthwise_by_kernel(
    values: int,
    channels: int,
    kernel_size: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    is_nhwc: bool,
    dtype: torch.dtype,
) -> bool:
    """Our depthwise convolution: large, oblong or dilated windows, 3×3, and small maps.

    oneDNN would copy a part of the channels, which our kernel reads where it lies; of bfloat16 it
    has whole vectors only.
    """
    rows, columns = kernel_size
    simple = rows == columns and tuple(dilation) == (1, 1) and rows * columns < _LARGE_WINDOW
    # For these our kernel has a way of its own; but a part of a vector of bfloat16 is slow.
    own = (rows, columns) == (3, 3) and tuple(padding) == (1, 1)
    simple &= not (own and (dtype == torch.float32 or channels % _VECTOR == 0))
    return not (simple and is_nhwc and multiplies(dtype)) or values <= _SMALL_MAP


# -- attention -----------------------------------------------------------------------------------

_MOST_KEYS_OF_TILES = 256
_MOST_TOKENS = 256
# Of keys, along a side: to find out which lines are the same takes longer for larger ones.
_LARGEST_WINDOW = 48
# Of the inputs of a linear layer that averages runs of a sequence on the way.
_LARGEST_SEQUENCE = 1024


@_rule
def softmax_attention_by_kernel(keys: int, dtype: torch.dtype) -> bool:
    """Our softmax attention, but for many keys in bfloat16 with AMX, which torch multiplies."""
    return keys <= _MOST_KEYS_OF_TILES or not by_tiles(dtype)


@_rule
def window_attention_by_kernel(window_size: int, dtype: torch.dtype) -> bool:
    """Windows attended to where they lie in the map, up to a side of 48 keys."""
    return window_size <= _LARGEST_WINDOW and softmax_attention_by_kernel(window_size**2, dtype)


@_rule
def rotated_attention_by_kernel(tokens: int, dtype: torch.dtype) -> bool:
    """RAVLT's softmax attention in one pass, but for large maps in bfloat16 that torch multiplies.

    RAVLT-T 1.08 times as fast at one image and at eight in float32, 1.02 and 1.06 in bfloat16.
    """
    return tokens <= _MOST_TOKENS or dtype != torch.bfloat16 or not multiplies(dtype)


@_rule
def single_head_by_kernel(tokens: int) -> bool:
    """SHViT's attention in one pass for small maps; torch's products are faster for larger ones.

    SHViT-S4 17.2 to 14.9 ms at one image, 79.1 to 76.9 at eight.
    """
    return tokens <= _MOST_TOKENS


@_rule
def averages_in_linear(features: int) -> bool:
    """FaViT's means of runs of a sequence by the linear layer behind them, up to 1024 inputs.

    FaViT-B0 23.1 to 21.8 ms at one image, 113.2 to 110.9 at eight.
    """
    return features <= _LARGEST_SEQUENCE
