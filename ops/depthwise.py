"""Depthwise convolution of channels-last maps on the CPU, for inference.

The kernel (``ops/native/depthwise.cpp``) is for what torch is slow at: large windows, dilated ones,
1×k and k×1, and every one of them with an activation behind it. There are no gradients.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ops import native
from ops.native.eager import is_plain_call, require_dtype, unsupported_tensors
from ops.native.threads import MACS, threads_for

__all__ = [
    "ACTIVATIONS",
    "depthwise_branches",
    "depthwise_conv2d",
    "prepare",
    "taps_first",
    "unsupported",
]

# The order is that of `activation::Kind` in ops/native/activation.h.
ACTIVATIONS = ("none", "relu", "gelu", "silu", "hardswish")

_KERNEL = "depthwise"


class _Problem(ctypes.Structure):
    """``depthwise::Problem`` of ops/native/depthwise.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "channels")),
        *(
            (name, ctypes.c_int64 * 2)
            for name in ("size", "out_size", "kernel", "stride", "padding", "dilation")
        ),
        *((name, ctypes.c_int64 * 3) for name in ("in_stride", "out_stride")),
        *((name, ctypes.c_int64) for name in ("activation", "bfloat16", "threads")),
    ]


class _Tensors(ctypes.Structure):
    """``depthwise::Tensors`` of ops/native/depthwise.h."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("input", "weight", "bias", "output")]


# The same as plain bytes, which are made in less time.
_TENSORS = struct.Struct(f"={len(_Tensors._fields_)}Q")


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
    return unsupported_tensors(_KERNEL, device, dtype)


def depthwise_conv2d(
    x: Tensor,
    taps: Tensor,
    bias: Tensor | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    activation: str = "none",
) -> Tensor:
    """Convolve each channel with its own window, then apply an activation. No gradients.

    Args:
        x: (B, C, H, W), float32 or bfloat16; another memory format than channels-last is copied.
        taps: (kh, kw, C) float32, see :func:`taps_first`.
        bias: (C,) float32.
        stride: of rows and columns; that of columns 1 or 2.
        padding: zeros at both sides of rows and columns.
        dilation: of rows and columns.
        activation: one of :data:`ACTIVATIONS`; GELU is the exact one.

    Returns:
        (B, C, H', W'), channels-last, in the dtype of ``x``; sums are of float32.

    Raises:
        ValueError: shapes or dtypes that do not go together, or an unknown activation.
        RuntimeError: the kernel is not available here (:func:`unsupported` tells beforehand).
    """
    convolve = _depthwise_conv2d if is_plain_call((x, taps, bias)) else _dispatched
    return convolve(x, taps, bias, stride, padding, dilation, activation)


def prepare(
    x: Tensor,
    taps: Tensor,
    bias: Tensor | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    activation: str = "none",
) -> Callable[[Tensor], Tensor] | None:
    """What does as :func:`depthwise_conv2d` for such ``x`` in the least time.

    It has the same shape, strides and dtype, :func:`ops.native.eager.is_plain_call` holds for it,
    and the number of threads is the same.

    Args:
        x, taps, bias, stride, padding, dilation, activation: as for :func:`depthwise_conv2d`.

    Returns:
        A function of ``x``; None where it has to be copied first, or the result is empty.

    Raises:
        ValueError, RuntimeError: see :func:`depthwise_conv2d`.
    """
    out = _empty_output(x, taps, bias, stride, padding, dilation, activation)
    if _channels_last(x) is not x or out.numel() == 0:
        return None
    forward = _library_or_raise(stride, x).depthwise_forward
    problem = ctypes.byref(_plan(x, taps, stride, padding, dilation, activation, out))
    shape = tuple(out.permute(0, 2, 3, 1).shape)

    def run(x: Tensor) -> Tensor:
        out = x.new_empty(shape)
        addresses = (x.data_ptr(), taps.data_ptr(), 0 if bias is None else bias.data_ptr())
        if forward(problem, _TENSORS.pack(*addresses, out.data_ptr())):
            raise MemoryError("no memory for the scratch of a depthwise convolution")
        return out.permute(0, 3, 1, 2)

    return run


def depthwise_branches(x: Tensor, taps: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
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
    plain = is_plain_call((x, *taps, *biases))
    return (_depthwise_branches if plain else _dispatched_branches)(x, taps, biases)


_library = torch.library.Library("vision_backbones", "FRAGMENT")
_library.define(
    "depthwise_conv2d(Tensor x, Tensor taps, Tensor? bias, int[2] stride, int[2] padding, "
    "int[2] dilation, str activation) -> Tensor"
)
_dispatched = torch.ops.vision_backbones.depthwise_conv2d.default
_library.define("depthwise_branches(Tensor x, Tensor[] taps, Tensor[] biases) -> Tensor")
_dispatched_branches = torch.ops.vision_backbones.depthwise_branches.default


@torch.library.impl(_library, "depthwise_conv2d", "CPU")
def _depthwise_conv2d(
    x: Tensor,
    taps: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activation: str,
) -> Tensor:
    out = _empty_output(x, taps, bias, stride, padding, dilation, activation)
    _run(_channels_last(x), taps, bias, stride, padding, dilation, activation, out)
    return out


@torch.library.register_fake("vision_backbones::depthwise_conv2d", lib=_library)
def _empty_output(
    x: Tensor,
    taps: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activation: str,
) -> Tensor:
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
    return _empty(x, (x.shape[0], x.shape[1], *size))


@torch.library.impl(_library, "depthwise_branches", "CPU")
def _depthwise_branches(x: Tensor, taps: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
    x = _channels_last(x)
    out = _empty(x, x.shape)
    library = _library_or_raise((1, 1), x)
    problems, starts = _branch_problems(
        tuple(x.shape),
        (_strides(x), _strides(out)),
        tuple(tuple(t.shape) for t in taps),
        tuple(tuple(b.shape) for b in biases),
        x.dtype == torch.bfloat16,
        torch.get_num_threads(),
    )
    for kernel, bias in zip(taps, biases, strict=True):
        require_dtype(torch.float32, taps=kernel, biases=bias)
    if out.numel() == 0:
        return out
    tensors = (_Tensors * len(taps))()
    for branch, start, kernel, bias in zip(tensors, starts, taps, biases, strict=True):
        offset = start * x.element_size()
        branch.input, branch.output = x.data_ptr() + offset, out.data_ptr() + offset
        branch.weight, branch.bias = kernel.data_ptr(), bias.data_ptr()
    count, passed = ctypes.c_int64(len(taps)), ctypes.c_int64(starts[0])
    if library.depthwise_branches(problems, tensors, count, passed):
        raise MemoryError("no memory for the scratch of a depthwise convolution")
    return out


@functools.lru_cache(maxsize=1024)
def _branch_problems(
    shape: tuple[int, ...],
    strides: tuple[tuple[int, int, int], tuple[int, int, int]],
    kernels: tuple[tuple[int, int, int], ...],
    biases: tuple[tuple[int, ...], ...],
    bfloat16: bool,
    threads: int,
) -> tuple[ctypes.Array[_Problem], list[int]]:
    """An array of them, and the first channel of each."""
    batch, channels, *size = shape
    start = channels - sum(kernel[2] for kernel in kernels)
    if not kernels or start < 0 or biases != tuple(kernel[2:] for kernel in kernels):
        raise ValueError(
            f"taps must be (kh, kw, c) each, with at most {channels} channels together, and "
            f"biases (c,), got {kernels} and {biases}"
        )
    if any(rows % 2 == 0 or columns % 2 == 0 for rows, columns, _ in kernels):
        raise ValueError(f"kernels of branches must be odd, got {kernels}")
    problems, starts = [], []
    for rows, columns, width in kernels:
        sizes = (batch, width, *size, rows, columns, *size)
        steps = (1, 1, rows // 2, columns // 2, 1, 1)
        problems.append(_problem(sizes, steps, *strides, 0, bfloat16, threads))
        starts.append(start)
        start += width
    return (_Problem * len(problems))(*problems), starts


@torch.library.register_fake("vision_backbones::depthwise_branches", lib=_library)
def _branches_output(x: Tensor, taps: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
    return _empty(x, x.shape)


def _empty(like: Tensor, shape: Sequence[int]) -> Tensor:
    return torch.empty(
        shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last
    )


def _channels_last(x: Tensor) -> Tensor:
    """``x`` with neighbouring channels side by side: itself, a copy where it is otherwise."""
    if x.stride(1) == 1 or x.shape[1] == 1:
        return x
    return x.contiguous(memory_format=torch.channels_last)


def _library_or_raise(stride: Sequence[int], x: Tensor) -> ctypes.CDLL:
    library = native.load(_KERNEL)
    reason = unsupported(stride, x.device, x.dtype)
    if library is None or reason is not None:
        raise RuntimeError(f"the depthwise kernel is not available: {reason}")
    return library


def _run(
    x: Tensor,
    taps: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activation: str,
    out: Tensor,
) -> None:
    """Into ``out``; the channels of both maps lie side by side."""
    library = _library_or_raise(stride, x)
    if out.numel() == 0:
        return
    problem = _plan(x, taps, stride, padding, dilation, activation, out)
    tensors = _Tensors(
        x.data_ptr(), taps.data_ptr(), None if bias is None else bias.data_ptr(), out.data_ptr()
    )
    if library.depthwise_forward(ctypes.byref(problem), ctypes.byref(tensors)):
        raise MemoryError("no memory for the scratch of a depthwise convolution")


def _plan(
    x: Tensor,
    taps: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activation: str,
    out: Tensor,
) -> _Problem:
    return _problem(
        (*x.shape, *taps.shape[:2], *out.shape[2:]),
        (*stride, *padding, *dilation),
        _strides(x),
        _strides(out),
        ACTIVATIONS.index(activation),
        x.dtype == torch.bfloat16,
        torch.get_num_threads(),
    )


@functools.lru_cache(maxsize=1024)  # a network has few different ones, and filling them in is slow
def _problem(
    sizes: tuple[int, ...],
    steps: tuple[int, ...],
    in_strides: tuple[int, int, int],
    out_strides: tuple[int, int, int],
    activation: int,
    bfloat16: bool,
    threads: int,
) -> _Problem:
    batch, channels, height, width, rows, columns, out_height, out_width = sizes
    macs = batch * channels * out_height * out_width * rows * columns
    return _Problem(
        batch,
        channels,
        (height, width),
        (out_height, out_width),
        (rows, columns),
        steps[:2],
        steps[2:4],
        steps[4:],
        in_strides,
        out_strides,
        activation,
        bfloat16,
        threads_for(macs, MACS, threads),
    )


def _strides(x: Tensor) -> tuple[int, int, int]:
    """Of image, row and pixel."""
    batch, _, row, pixel = x.stride()
    return batch, row, pixel
