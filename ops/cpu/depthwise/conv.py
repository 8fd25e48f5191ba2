"""Depthwise convolution of channels-last maps on the CPU, for inference.

The kernels (``depthwise.h``, ``branches.h``) are for what torch is slow at: large windows, dilated
ones, 1×k and k×1, and every one of them with an activation behind it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ops.cpu.activations import ACTIVATIONS
from ops.cpu.binding import Addresses, Call, kernel
from ops.cpu.dispatch import require_dtype
from ops.cpu.structures import structure
from ops.cpu.threads import MACS, threads_for

__all__ = ["depthwise_branches", "depthwise_conv2d", "taps_first", "unsupported"]

_PROBLEM = structure("depthwise/depthwise.h", "depthwise::Problem")
_TENSORS = structure("depthwise/depthwise.h", "depthwise::Tensors")


def taps_first(weight: Tensor) -> Tensor:
    """The weight of a depthwise convolution as the kernel wants it.

    Args:
        weight: (C, 1, kh, kw).

    Returns:
        (kh, kw, C), contiguous, float32.
    """
    return weight.detach().squeeze(1).permute(1, 2, 0).to(torch.float32).contiguous()


def unsupported(stride: Sequence[int], device: torch.device, dtype: torch.dtype) -> str | None:
    """``None`` if the kernel takes such a convolution, else the reason in words.

    The first call on a machine compiles the kernel, which takes some seconds.
    """
    if not 1 <= stride[1] <= 2:
        return f"the kernel takes strides of 1 and 2, not {stride[1]}"
    return depthwise_conv2d.unsupported(device, dtype)


@kernel("depthwise", "depthwise_forward")
def depthwise_conv2d(
    x: Tensor,
    taps: Tensor,
    bias: Tensor | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    activation: str = "none",
) -> Call:
    """Convolve each channel with its own window, then apply an activation. No gradients.

    Args:
        x: (B, C, H, W), float32 or bfloat16; another memory format than channels-last is copied.
        taps: (kh, kw, C) float32, see :func:`taps_first`.
        bias: (C,) float32.
        stride: of rows and columns; that of columns 1 or 2.
        padding: zeros at both sides of rows and columns.
        dilation: of rows and columns.
        activation: one of :data:`ops.cpu.activations.ACTIVATIONS`.

    Returns:
        (B, C, H', W'), channels-last, in the dtype of ``x``; sums are of float32.

    Raises:
        ValueError: shapes or dtypes that do not go together, or an unknown activation.
        RuntimeError: the kernel is not available here (:func:`unsupported` tells beforehand).
    """
    if x.ndim != 4 or taps.ndim != 3 or taps.shape[2] != x.shape[1]:
        raise ValueError(
            "x must be (B, C, H, W) and taps (kh, kw, C), got "
            f"{tuple(x.shape)} and {tuple(taps.shape)}"
        )
    if bias is not None and bias.shape != x.shape[1:2]:
        raise ValueError(f"bias must be ({x.shape[1]},), got {tuple(bias.shape)}")
    require_dtype(torch.float32, taps=taps, bias=bias)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {ACTIVATIONS}, got {activation!r}")
    if not 1 <= stride[1] <= 2:
        raise RuntimeError(f"the kernel takes strides of 1 and 2, not {stride[1]}")
    size = []
    for axis in range(2):
        reach = dilation[axis] * (taps.shape[axis] - 1)
        free = x.shape[2 + axis] + 2 * padding[axis] - reach - 1
        if free < 0:
            raise ValueError(
                f"a map of {x.shape[2]}×{x.shape[3]}, padded by {tuple(padding)}, is smaller than "
                f"a window of {taps.shape[0]}×{taps.shape[1]} with dilation {tuple(dilation)}"
            )
        size.append(free // stride[axis] + 1)
    out = _empty(x, (x.shape[0], x.shape[1], *size))

    def arguments() -> Any:
        pixels = _channels_last(x)
        problem = _problem(
            (*x.shape, *taps.shape[:2], *out.shape[2:]),
            (*stride, *padding, *dilation),
            _strides(pixels),
            _strides(out),
            activation,
            x.dtype == torch.bfloat16,
            torch.get_num_threads(),
        )
        tensors = {"in": pixels, "weight": taps, "bias": bias, "out": out}
        return problem, Addresses(_TENSORS, tensors)

    return Call(out, arguments)


@kernel("depthwise", "depthwise_branches")
def depthwise_branches(x: Tensor, taps: Sequence[Tensor], biases: Sequence[Tensor]) -> Call:
    """Convolve the last channels, a group with each kernel; the first channels pass. No gradients.

    Args:
        x: (B, C, H, W), as for :func:`depthwise_conv2d`.
        taps: (kh, kw, c) each, with odd kernels, float32; their channels add up to C at most.
        biases: (c,) each, float32.

    Returns:
        (B, C, H, W), channels-last.

    Raises:
        ValueError, RuntimeError: see :func:`depthwise_conv2d`.
    """
    kernels = tuple(tuple(t.shape) for t in taps)
    starts = _branch_starts(x.shape[1], kernels, tuple(tuple(b.shape) for b in biases))
    for t, bias in zip(taps, biases, strict=True):
        require_dtype(torch.float32, taps=t, biases=bias)
    out = _empty(x, x.shape)

    def arguments() -> Any:
        pixels, size = _channels_last(x), x.element_size()
        half, threads = x.dtype == torch.bfloat16, torch.get_num_threads()
        strides = _strides(pixels), _strides(out)
        problems = _branch_problems(tuple(x.shape), kernels, strides, half, threads)
        branches = [
            Addresses(
                _TENSORS,
                {
                    **{"in": (pixels, start * size), "out": (out, start * size)},
                    **{"weight": t, "bias": bias},
                },
            )
            for start, t, bias in zip(starts, taps, biases, strict=True)
        ]
        return problems, branches, len(branches), starts[0]

    return Call(out, arguments)


def _branch_starts(
    channels: int, kernels: tuple[tuple[int, ...], ...], biases: tuple[tuple[int, ...], ...]
) -> list[int]:
    """The first channel of each."""
    start = channels - sum(kernel[2] for kernel in kernels)
    if not kernels or start < 0 or biases != tuple(kernel[2:] for kernel in kernels):
        raise ValueError(
            f"taps must be (kh, kw, c) each, with at most {channels} channels together, and "
            f"biases (c,), got {kernels} and {biases}"
        )
    if any(rows % 2 == 0 or columns % 2 == 0 for rows, columns, _ in kernels):
        raise ValueError(f"kernels of branches must be odd, got {kernels}")
    starts = []
    for _, _, width in kernels:
        starts.append(start)
        start += width
    return starts


@functools.lru_cache(maxsize=1024)
def _branch_problems(
    shape: tuple[int, ...],
    kernels: tuple[tuple[int, ...], ...],
    strides: tuple[tuple[int, ...], tuple[int, ...]],
    bfloat16: bool,
    threads: int,
) -> Any:
    """An array of them."""
    batch, _, *size = shape
    problems = [
        _problem(
            (batch, width, *size, rows, columns, *size),
            (1, 1, rows // 2, columns // 2, 1, 1),
            *strides,
            "none",
            bfloat16,
            threads,
        )
        for rows, columns, width in kernels
    ]
    return (_PROBLEM * len(problems))(*problems)


def _empty(like: Tensor, shape: Sequence[int]) -> Tensor:
    return torch.empty(
        shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last
    )


def _channels_last(x: Tensor) -> Tensor:
    """``x`` with neighbouring channels side by side: itself, a copy where it is otherwise."""
    if x.stride(1) == 1 or x.shape[1] == 1:
        return x
    return x.contiguous(memory_format=torch.channels_last)


@functools.lru_cache(maxsize=1024)  # a network has few different ones, and filling them in is slow
def _problem(
    sizes: tuple[int, ...],
    steps: tuple[int, ...],
    in_stride: tuple[int, ...],
    out_stride: tuple[int, ...],
    activation: str,
    bfloat16: bool,
    threads: int,
) -> Any:
    batch, channels, height, width, rows, columns, out_height, out_width = sizes
    macs = batch * channels * out_height * out_width * rows * columns
    return _PROBLEM(
        batch=batch,
        channels=channels,
        size=(height, width),
        out_size=(out_height, out_width),
        kernel=(rows, columns),
        stride=steps[:2],
        padding=steps[2:4],
        dilation=steps[4:],
        in_stride=in_stride,
        out_stride=out_stride,
        activation=ACTIVATIONS.index(activation),
        bfloat16=bfloat16,
        threads=threads_for(macs, MACS, threads),
    )


def _strides(x: Tensor) -> tuple[int, int, int]:
    """Of image, row and pixel."""
    batch, _, row, pixel = x.stride()
    return batch, row, pixel
