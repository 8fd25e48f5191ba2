"""Convolutions of all channels on the CPU for inference, as linear layers on windows.

The kernel (``ops/native/convolution.h``, in the library of :mod:`ops.linear`) copies the windows of
some pixels at a time. It takes float32 or bfloat16; there are no gradients.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor, nn

from ops.depthwise import ACTIVATIONS
from ops.linear import library_or_raise, pack_weight
from ops.native.eager import is_plain_call
from ops.native.threads import MACS, threads_for

__all__ = ["PackedConv2d"]


class _Problem(ctypes.Structure):
    """``convolution::Problem`` of ops/native/convolution.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "height", "width", "channels")),
        *((name, ctypes.c_int64) for name in ("out_height", "out_width", "out_channels")),
        *((name, ctypes.c_int64 * 2) for name in ("kernel", "stride", "padding")),
        *((name, ctypes.c_int64) for name in ("activation", "bfloat16", "threads")),
    ]


class _Tensors(ctypes.Structure):
    """``convolution::Tensors`` of ops/native/convolution.h."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("input", "weight", "bias", "output")]


class PackedConv2d:
    """``activation(conv(x))``.

    Args:
        conv: without groups and dilation, padded with zeros, in float32 or bfloat16.

    Raises:
        ValueError: a convolution with groups or dilation, or padded otherwise.
        RuntimeError: the kernel is not available here, see :func:`ops.linear.unsupported`.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        padding: Any = conv.padding
        if conv.groups != 1 or conv.dilation != (1, 1):
            raise ValueError(f"a convolution must have no groups and no dilation, got {conv}")
        if isinstance(padding, str) or conv.padding_mode != "zeros":
            raise ValueError(f"a convolution must be padded with a number of zeros, got {conv}")
        weight = conv.weight.detach()
        self._weight = pack_weight(weight.permute(0, 2, 3, 1).flatten(1))
        bias = weight.new_zeros(len(weight)) if conv.bias is None else conv.bias.detach()
        self._bias = bias.float()
        self._geometry = [conv.in_channels, *conv.kernel_size, *conv.stride, *padding]

    def __call__(self, x: Tensor, activation: str = "none") -> Tensor:
        """(B, C, H, W) → (B, C', H', W'), channels-last.

        Args:
            x: in the dtype of the weight; copied where its channels are not last.
            activation: one of :data:`ops.depthwise.ACTIVATIONS`.

        Raises:
            ValueError: another dtype or number of channels, a map that no window fits in, an
                unknown activation.
        """
        inputs = (x, self._weight, self._bias, self._geometry, activation)
        if is_plain_call((x,)):
            return _run(*inputs)
        return torch.ops.vision_backbones.packed_conv2d.default(*inputs)


_library = torch.library.Library("vision_backbones", "FRAGMENT")
_library.define(
    "packed_conv2d(Tensor x, Tensor weight, Tensor bias, int[] geometry, str activation) -> Tensor"
)


@torch.library.impl(_library, "packed_conv2d", "CPU")
def _run(x: Tensor, weight: Tensor, bias: Tensor, geometry: list[int], activation: str) -> Tensor:
    out = _empty_output(x, weight, bias, geometry, activation)
    library = library_or_raise(x)
    if out.numel() == 0:
        return out
    x = x.contiguous(memory_format=torch.channels_last)
    problem = _problem(
        tuple(x.shape),
        tuple(out.shape),
        tuple(geometry),
        x.dtype == torch.bfloat16,
        activation,
        torch.get_num_threads(),
    )
    tensors = _Tensors(*(t.data_ptr() for t in (x, weight, bias, out)))
    if library.convolution_forward(ctypes.byref(problem), ctypes.byref(tensors)):
        raise MemoryError("no memory for the windows of a convolution")
    return out


@torch.library.register_fake("vision_backbones::packed_conv2d", lib=_library)
def _empty_output(
    x: Tensor, weight: Tensor, bias: Tensor, geometry: list[int], activation: str
) -> Tensor:
    channels, *sides = geometry
    if x.ndim != 4 or x.shape[1] != channels or x.dtype != weight.dtype:
        raise ValueError(
            f"x must be (B, {channels}, H, W) of {weight.dtype}, got {tuple(x.shape)} of {x.dtype}"
        )
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {ACTIVATIONS}, got {activation!r}")
    kernel_size, stride, padding = sides[:2], sides[2:4], sides[4:]
    size = [
        (n + 2 * p - k) // s + 1
        for n, k, s, p in zip(x.shape[2:], kernel_size, stride, padding, strict=True)
    ]
    if min(size) < 1:
        raise ValueError(
            f"a map of {tuple(x.shape[2:])} with padding {tuple(padding)} is smaller than the "
            f"window of {tuple(kernel_size)}"
        )
    shape = (len(x), len(bias), *size)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


@functools.lru_cache(maxsize=256)
def _problem(
    shape: tuple[int, ...],
    out_shape: tuple[int, ...],
    geometry: tuple[int, ...],
    bfloat16: bool,
    activation: str,
    threads: int,
) -> _Problem:
    batch, channels, height, width = shape
    _, out_channels, out_height, out_width = out_shape
    pairs = [(ctypes.c_int64 * 2)(*geometry[i : i + 2]) for i in (1, 3, 5)]
    window = channels * geometry[1] * geometry[2]
    macs = batch * out_height * out_width * out_channels * window
    return _Problem(
        batch,
        *(height, width, channels),
        *(out_height, out_width, out_channels, *pairs),
        ACTIVATIONS.index(activation),
        bfloat16,
        threads_for(macs, MACS, threads),
    )
