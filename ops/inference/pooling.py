"""Means of windows on the CPU for inference: pooling, squeezing, representing regions.

The kernel (``ops/native/pooling.cpp``) goes along with the memory of maps with channels last, for
which torch's takes many times as long. There are no gradients.
"""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor, nn

from ops import native
from ops.native.eager import is_plain_call, unsupported_tensors
from ops.native.threads import VALUES, threads_for

__all__ = ["FastAdaptiveAvgPool2d", "takes", "unsupported", "window_means"]

_KERNEL = "pooling"


class _Problem(ctypes.Structure):
    """``pooling::Problem`` of ops/native/pooling.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "height", "width", "channels")),
        ("stride", ctypes.c_int64 * 3),
        ("window", ctypes.c_int64 * 2),
        *((name, ctypes.c_int64) for name in ("bfloat16", "threads")),
    ]


def unsupported(device: torch.device, dtype: torch.dtype) -> str | None:
    """``None`` if the kernel takes such tensors, else the reason in words.

    The first call on a machine compiles the kernel, which takes some seconds.
    """
    return unsupported_tensors(_KERNEL, device, dtype)


def takes(x: Tensor) -> bool:
    """Whether :func:`window_means` may stand for torch's functions on ``x``, of any layout."""
    return (
        not torch.compiler.is_compiling()
        and type(x) is Tensor
        and torch._C._functorch.peek_interpreter_stack() is None  # vmap, grad and the like
        and not (torch.is_grad_enabled() and x.requires_grad)
        and unsupported(x.device, x.dtype) is None
    )


def window_means(x: Tensor, window_size: tuple[int, int]) -> Tensor:
    """The means of windows side by side, each of what belongs to the map. No gradients.

    Args:
        x: (B, H, W, C), float32 or bfloat16; copied where its channels are not neighbours.
        window_size: rows and columns of a window.

    Returns:
        (B, ⌈H/rows⌉, ⌈W/columns⌉, C), contiguous, in the dtype of ``x``; sums are of float32.

    Raises:
        ValueError: not four axes, an empty map, another dtype, or a window without pixels.
        RuntimeError: the kernel is not available here (:func:`unsupported` tells beforehand).
    """
    forward = _window_means if is_plain_call((x,)) else _dispatched
    return forward(x, list(window_size))


_library = torch.library.Library("vision_backbones", "FRAGMENT")
_library.define("window_means(Tensor x, int[] window_size) -> Tensor")
_dispatched = torch.ops.vision_backbones.window_means.default


@torch.library.impl(_library, "window_means", "CPU")
def _window_means(x: Tensor, window_size: list[int]) -> Tensor:
    out = _empty_output(x, window_size)
    library = native.load(_KERNEL)
    if library is None:
        raise RuntimeError(f"no kernel of pooling: {native.unavailable_reason(_KERNEL)}")
    if out.numel() == 0:
        return out
    x = x if x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous()
    threads = threads_for(x.numel(), VALUES, torch.get_num_threads())
    problem = _problem(
        tuple(x.shape), x.stride(), tuple(window_size), x.dtype == torch.bfloat16, threads
    )
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (x, out)]
    if library.pooling_forward(ctypes.byref(problem), *pointers):
        raise MemoryError("no memory to pool a map")
    return out


@torch.library.register_fake("vision_backbones::window_means", lib=_library)
def _empty_output(x: Tensor, window_size: list[int]) -> Tensor:
    if x.ndim != 4 or x.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(
            f"x must be (B, H, W, C) of float32 or bfloat16, got {tuple(x.shape)} of {x.dtype}"
        )
    if min(window_size) < 1 or 0 in x.shape[1:3]:
        raise ValueError(
            f"a window and the map must have pixels, got {tuple(window_size)} and {tuple(x.shape)}"
        )
    rows, columns = (-(-n // side) for n, side in zip(x.shape[1:3], window_size, strict=True))
    return x.new_empty(x.shape[0], rows, columns, x.shape[3])


@functools.lru_cache(maxsize=256)
def _problem(
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    window_size: tuple[int, ...],
    bfloat16: bool,
    threads: int,
) -> _Problem:
    strides = (ctypes.c_int64 * 3)(*stride[:3])
    return _Problem(*shape, strides, (ctypes.c_int64 * 2)(*window_size), bfloat16, threads)


class FastAdaptiveAvgPool2d(nn.AdaptiveAvgPool2d):
    """To one pixel by our kernel: (B, C, H, W) → (B, C, 1, 1)."""

    def forward(self, x: Tensor) -> Tensor:
        if self.output_size not in (1, (1, 1)) or x.ndim != 4 or not x.numel() or not takes(x):
            return super().forward(x)
        pixels = x.permute(0, 2, 3, 1)
        return window_means(pixels, (x.shape[2], x.shape[3])).permute(0, 3, 1, 2)
