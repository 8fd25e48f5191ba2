"""Deformable convolution of channels-last maps on the CPU, for inference.

The kernel (``ops/native/deformable.cpp``) interpolates what the taps of some pixels see and takes
it through a linear layer with packed weights while it is in the cache. It takes float32 or
bfloat16; there are no gradients.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from ops import native
from ops.depthwise import ACTIVATIONS
from ops.linear import pack_weight
from ops.linear import unsupported as linear_unsupported
from ops.native.eager import is_plain_call
from ops.native.linear_plan import packed_inputs
from ops.native.threads import MACS, threads_for

__all__ = ["deformable_conv2d", "pack_taps", "unsupported"]

_KERNEL = "deformable"


class _Problem(ctypes.Structure):
    """``deformable::Problem`` of ops/native/deformable.h."""

    _fields_ = [
        *(
            (name, ctypes.c_int64)
            for name in (
                *("batch", "height", "width", "channels", "out_height", "out_width"),
                *("out_features", "kernel", "stride"),
            )
        ),
        ("in_stride", ctypes.c_int64 * 3),
        *((name, ctypes.c_int64) for name in ("activation", "bfloat16", "threads")),
    ]


class _Tensors(ctypes.Structure):
    """``deformable::Tensors`` of ops/native/deformable.h."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("input", "offset", "weight", "bias", "output")]


def unsupported(device: torch.device, dtype: torch.dtype) -> str | None:
    """``None`` if the kernel takes such tensors, else the reason in words.

    The first call on a machine compiles the kernel, which takes some seconds.
    """
    reason = linear_unsupported(device, dtype, with_bfloat16=True)
    return reason or native.unavailable_reason(_KERNEL)


def pack_taps(weight: Tensor) -> Tensor:
    """The weight of a convolution, (out_chs, in_chs, k, k), as the kernel wants it.

    Raises:
        RuntimeError: the kernel is not available here.
    """
    return pack_weight(weight.detach().permute(0, 2, 3, 1).flatten(1))


def deformable_conv2d(
    x: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor,
    kernel_size: int,
    stride: int,
    activation: str = "none",
) -> Tensor:
    """As ``torchvision.ops.deform_conv2d`` without padding or mask, then an activation.

    Args:
        x: (B, C, H, W), float32 or bfloat16 as the weight; another memory format than channels-last
            is copied.
        offset: (B, 2·k², H', W'), of any dtype: row and column of each tap, where
            H' = (H - k) // stride + 1.
        weight: see :func:`pack_taps`.
        bias: (out_chs,) float32.
        kernel_size, stride: k and stride, of rows and columns alike.
        activation: one of :data:`ops.depthwise.ACTIVATIONS`; GELU is the exact one.

    Returns:
        (B, out_chs, H', W'), channels-last.

    Raises:
        ValueError: offsets or a weight that do not go with the map, dtypes that do not.
        RuntimeError: the kernel is not available here (:func:`unsupported` tells beforehand).
    """
    inputs: tuple[Any, ...] = (x, offset, weight, bias, kernel_size, stride, activation)
    if is_plain_call(inputs[:4]):
        return _run(*inputs)
    return torch.ops.vision_backbones.deformable_conv2d.default(*inputs)


_library = torch.library.Library("vision_backbones", "FRAGMENT")
_library.define(
    "deformable_conv2d(Tensor x, Tensor offset, Tensor weight, Tensor bias, int kernel_size, "
    "int stride, str activation) -> Tensor"
)


@torch.library.register_fake("vision_backbones::deformable_conv2d", lib=_library)
def _empty_output(
    x: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor,
    kernel_size: int,
    stride: int,
    activation: str,
) -> Tensor:
    height, width = ((n - kernel_size) // stride + 1 for n in x.shape[2:])
    expected = (x.shape[0], 2 * kernel_size**2, height, width)
    if min(expected[2:]) < 1 or offset.shape != expected:
        raise ValueError(f"offset must be {expected}, got {tuple(offset.shape)}")
    inputs = x.shape[1] * kernel_size**2
    packed = packed_inputs(inputs, x.dtype)
    if weight.numel() < packed * len(bias) or weight.numel() % packed:
        raise ValueError(f"weight is not that of {len(bias)} outputs of {inputs} inputs")
    dtypes = (x.dtype, weight.dtype, bias.dtype)
    if x.dtype not in (torch.float32, torch.bfloat16) or dtypes[1:] != (x.dtype, torch.float32):
        raise ValueError(
            "x and weight must be float32, or both bfloat16, and bias float32; "
            f"got {', '.join(map(str, dtypes))}"
        )
    return x.new_empty(x.shape[0], height, width, len(bias)).permute(0, 3, 1, 2)


@torch.library.impl(_library, "deformable_conv2d", "CPU")
def _run(
    x: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor,
    kernel_size: int,
    stride: int,
    activation: str,
) -> Tensor:
    out = _empty_output(x, offset, weight, bias, kernel_size, stride, activation)
    library = native.load(_KERNEL)
    if library is None:
        reason = native.unavailable_reason(_KERNEL)
        raise RuntimeError(f"the kernel of deformable convolutions is not available: {reason}")
    if out.numel() == 0:
        return out
    if x.stride(1) != 1:
        x = x.contiguous(memory_format=torch.channels_last)
    offset = offset.permute(0, 2, 3, 1).float().contiguous()
    batch, channels, height, width = x.shape
    problem = _problem(
        (batch, height, width, channels, *out.shape[2:], out.shape[1], kernel_size, stride),
        (x.stride(0), x.stride(2), x.stride(3)),
        activation,
        x.dtype == torch.bfloat16,
        torch.get_num_threads(),
    )
    addresses = _Tensors(*(t.data_ptr() for t in (x, offset, weight, bias, out)))
    if library.deformable_forward(ctypes.byref(problem), ctypes.byref(addresses)):
        raise MemoryError("no memory for the scratch of a deformable convolution")
    return out


@functools.lru_cache(maxsize=1024)  # a network has few different ones, and filling them in is slow
def _problem(
    sizes: tuple[int, ...],
    in_stride: tuple[int, ...],
    activation: str,
    bfloat16: bool,
    threads: int,
) -> _Problem:
    batch, _, _, channels, out_height, out_width, out_features, kernel_size, _ = sizes
    macs = batch * out_height * out_width * out_features * channels * kernel_size**2
    return _Problem(
        *sizes,
        in_stride,
        ACTIVATIONS.index(activation),
        bfloat16,
        threads_for(macs, MACS, threads),
    )
