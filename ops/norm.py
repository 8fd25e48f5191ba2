"""Layer norm of maps on the CPU for inference, with an activation behind it.

The kernel (``ops/native/norm.cpp``) is for maps of few channels, where torch's layer norm spends
its time between the pixels. There are no gradients.
"""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from ops import native
from ops.depthwise import ACTIVATIONS
from ops.native.eager import is_plain_call, require_dtype, unsupported_tensors

__all__ = ["layer_norm", "unsupported"]

_KERNEL = "norm"


class _Problem(ctypes.Structure):
    """``norm::Problem`` of ops/native/norm.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("pixels", "dim", "activation", "bfloat16")),
        ("eps", ctypes.c_double),
        ("threads", ctypes.c_int64),
    ]


class _Tensors(ctypes.Structure):
    """``norm::Tensors`` of ops/native/norm.h."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("input", "weight", "bias", "output")]


def unsupported(device: torch.device, dtype: torch.dtype) -> str | None:
    """``None`` if the kernel takes such tensors, else the reason in words.

    The first call on a machine compiles the kernel, which takes some seconds.
    """
    return unsupported_tensors(_KERNEL, device, dtype)


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, activation: str = "none"
) -> Tensor:
    """``activation(norm(x) * weight + bias)`` over the last axis. No gradients.

    Args:
        x: (..., dim), float32 or bfloat16.
        weight, bias: (dim,) float32.
        eps: added to the variance.
        activation: one of :data:`ops.depthwise.ACTIVATIONS`; GELU is the exact one.

    Returns:
        (..., dim), contiguous, in the dtype of ``x``; sums are of float32.

    Raises:
        ValueError: shapes or dtypes that do not go together, or an unknown activation.
        RuntimeError: the kernel is not available here (:func:`unsupported` tells beforehand).
    """
    forward = _layer_norm if is_plain_call((x, weight, bias)) else _dispatched
    return forward(x, weight, bias, eps, activation)


_library = torch.library.Library("vision_backbones", "FRAGMENT")
_library.define(
    "layer_norm(Tensor x, Tensor weight, Tensor bias, float eps, str activation) -> Tensor"
)
_dispatched = torch.ops.vision_backbones.layer_norm.default


@torch.library.impl(_library, "layer_norm", "CPU")
def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, activation: str) -> Tensor:
    out = _empty_output(x, weight, bias, eps, activation)
    library, reason = native.load(_KERNEL), unsupported(x.device, x.dtype)
    if library is None or reason is not None:
        raise RuntimeError(f"the kernel of layer norm is not available: {reason}")
    if out.numel() == 0:
        return out
    pixels, half = x.numel() // x.shape[-1], x.dtype == torch.bfloat16
    problem = _problem(pixels, x.shape[-1], activation, half, eps, torch.get_num_threads())
    x = x.contiguous()
    tensors = _Tensors(*(t.data_ptr() for t in (x, weight, bias, out)))
    if library.norm_forward(ctypes.byref(problem), ctypes.byref(tensors)):
        raise MemoryError("no memory for the scratch of a layer norm")
    return out


@torch.library.register_fake("vision_backbones::layer_norm", lib=_library)
def _empty_output(x: Tensor, weight: Tensor, bias: Tensor, eps: float, activation: str) -> Tensor:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {ACTIVATIONS}, got {activation!r}")
    if not weight.shape == bias.shape == x.shape[-1:]:
        raise ValueError(
            "x must be (..., dim), weight and bias (dim,), got "
            f"{tuple(x.shape)}, {tuple(weight.shape)} and {tuple(bias.shape)}"
        )
    require_dtype(torch.float32, weight=weight, bias=bias)
    return x.new_empty(x.shape)


@functools.lru_cache(maxsize=1024)  # a network has few different ones, and filling them in is slow
def _problem(
    pixels: int, dim: int, activation: str, bfloat16: bool, eps: float, threads: int
) -> _Problem:
    return _Problem(pixels, dim, ACTIVATIONS.index(activation), bfloat16, eps, threads)
