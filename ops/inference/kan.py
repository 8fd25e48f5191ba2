"""Kolmogorov-Arnold layers on the CPU in one pass, for inference.

The kernel (``ops/native/kan.cpp``) makes the bumps of some rows and maps them while they are in the
cache. It takes float32 or bfloat16; there are no gradients.
"""

from __future__ import annotations

import ctypes
import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from ops import native
from ops.inference.layers import FastLayer
from ops.kan import KANLayer
from ops.linear import pack_weight
from ops.linear import unsupported as linear_unsupported
from ops.native.eager import is_plain_call
from ops.native.linear_plan import packed_inputs
from ops.native.threads import MACS, threads_for

__all__ = ["FastKANLayer", "PackedKAN", "kan_layer", "pack_kan", "unsupported"]

_KERNEL = "kan"
_FAR = 30.0  # that a grid may reach, in powers of two; half of FAR in ops/native/kan.h


class _Problem(ctypes.Structure):
    """``kan::Problem`` of ops/native/kan.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("rows", "in_features", "grids", "out_features")),
        *((name, ctypes.c_double) for name in ("eps", "scale")),
        *((name, ctypes.c_int64) for name in ("bfloat16", "threads")),
    ]


class _Tensors(ctypes.Structure):
    """``kan::Tensors`` of ops/native/kan.h."""

    _fields_ = [
        (name, ctypes.c_void_p)
        for name in ("input", "norm_weight", "norm_bias", "powers", "weight", "bias", "output")
    ]


class PackedKAN(NamedTuple):
    """A layer's parameters as the kernel wants them.

    ``norm_weight`` and ``norm_bias`` (in_features,), ``powers`` (num_grids,), two to the grid
    points times ``scale``, and ``bias`` (out_features,), zeros, are float32; ``weight`` is packed,
    from num_grids · in_features.
    """

    norm_weight: Tensor
    norm_bias: Tensor
    powers: Tensor
    weight: Tensor
    bias: Tensor
    eps: float
    scale: float


def unsupported(device: torch.device, dtype: torch.dtype) -> str | None:
    """``None`` if the kernel takes such tensors, else the reason in words.

    The first call on a machine compiles the kernel, which takes some seconds.
    """
    reason = linear_unsupported(device, dtype, with_bfloat16=True)
    return reason or native.unavailable_reason(_KERNEL)


def pack_kan(layer: KANLayer) -> PackedKAN | None:
    """The parameters of a layer, or None where its grid is finer than the kernel resolves.

    Raises:
        RuntimeError: the kernel is not available here.
    """
    scale = 2 / (layer.width * math.log(2))
    grid = layer.grid.detach().double() * scale
    if grid.abs().max() > _FAR:
        return None
    by_grid = layer.linear.weight.detach().unflatten(1, (-1, len(grid))).transpose(1, 2).flatten(1)
    norm_weight, norm_bias = (t.detach().float() for t in layer.norm.parameters())
    return PackedKAN(
        norm_weight,
        norm_bias,
        torch.exp2(grid).float(),
        pack_weight(by_grid),
        norm_bias.new_zeros(len(by_grid)),
        layer.norm.eps,
        scale,
    )


def kan_layer(x: Tensor, packed: PackedKAN) -> Tensor:
    """As the :class:`ops.kan.KANLayer` that was packed. No gradients.

    Args:
        x: (..., in_features), float32 or bfloat16 as the packed weight.
        packed: see :func:`pack_kan`.

    Returns:
        (..., out_features), contiguous.

    Raises:
        ValueError: inputs of another width or dtype.
        RuntimeError: the kernel is not available here (:func:`unsupported` tells beforehand).
    """
    if is_plain_call((x, *packed[:5])):
        return _run(x, *packed)
    return torch.ops.vision_backbones.kan_layer.default(x, *packed)


_library = torch.library.Library("vision_backbones", "FRAGMENT")
_library.define(
    "kan_layer(Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor powers, Tensor weight, "
    "Tensor bias, float eps, float scale) -> Tensor"
)


@torch.library.register_fake("vision_backbones::kan_layer", lib=_library)
def _empty_output(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    powers: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    scale: float,
) -> Tensor:
    if x.shape[-1:] != norm_weight.shape or x.dtype != weight.dtype:
        raise ValueError(
            f"x must be (..., {len(norm_weight)}) of {weight.dtype}, got {tuple(x.shape)} of "
            f"{x.dtype}"
        )
    features = packed_inputs(len(norm_weight) * len(powers), x.dtype)
    if weight.numel() < features * len(bias) or weight.numel() % features:
        raise ValueError(
            f"weight is not that of {len(bias)} outputs of {len(norm_weight)} inputs at "
            f"{len(powers)} points"
        )
    return x.new_empty(*x.shape[:-1], len(bias))


@torch.library.impl(_library, "kan_layer", "CPU")
def _run(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    powers: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    scale: float,
) -> Tensor:
    out = _empty_output(x, norm_weight, norm_bias, powers, weight, bias, eps, scale)
    library, reason = native.load(_KERNEL), unsupported(x.device, x.dtype)
    if library is None or reason is not None:
        raise RuntimeError(f"the kernel of Kolmogorov-Arnold layers is not available: {reason}")
    if out.numel() == 0:
        return out
    x = x.contiguous()
    sizes = (x.numel() // len(norm_weight), len(norm_weight), len(powers), len(bias))
    half = x.dtype == torch.bfloat16
    problem = _problem(sizes, eps, scale, half, torch.get_num_threads())
    addresses = _Tensors(
        *(t.data_ptr() for t in (x, norm_weight, norm_bias, powers, weight, bias, out))
    )
    if library.kan_forward(ctypes.byref(problem), ctypes.byref(addresses)):
        raise MemoryError("no memory for the scratch of a Kolmogorov-Arnold layer")
    return out


@functools.lru_cache(maxsize=1024)  # a network has few different ones, and filling them in is slow
def _problem(
    sizes: tuple[int, ...], eps: float, scale: float, bfloat16: bool, threads: int
) -> _Problem:
    return _Problem(*sizes, eps, scale, bfloat16, threads_for(math.prod(sizes), MACS, threads))


class FastKANLayer(FastLayer, KANLayer):
    """In one pass where the kernel can be had."""

    def forward(self, x: Tensor) -> Tensor:
        packed = self.derived(x)
        return super().forward(x) if packed is None else kan_layer(x, packed)

    def sources(self) -> list[Tensor]:
        return [self.linear.weight, self.grid, *self.norm.parameters()]

    def derive(self, x: Tensor) -> PackedKAN | None:
        return None if unsupported(x.device, x.dtype) is not None else pack_kan(self)
