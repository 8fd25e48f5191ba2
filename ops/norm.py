"""Layer norm on the CPU for inference, with an activation behind it.

The kernel (``ops/native/norm.cpp``) norms some pixels together; torch's waits for the sums of each
one. There are no gradients.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Callable

import torch
from torch import Tensor

from ops import native
from ops.depthwise import ACTIVATIONS
from ops.native.eager import is_plain_call, require_dtype, unsupported_tensors
from ops.native.threads import VALUES, threads_for

__all__ = ["layer_norm", "prepare", "unsupported"]

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


# Tensors in bytes, which takes less time than to fill in the structure.
_TENSORS = struct.Struct(f"={len(_Tensors._fields_)}Q")


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


def prepare(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, activation: str = "none"
) -> Callable[[Tensor], Tensor] | None:
    """What does as :func:`layer_norm` for such ``x`` in the least time.

    It has the same shape, strides and dtype, :func:`ops.native.eager.is_plain_call` holds for it,
    and the number of threads is the same.

    Args:
        x, weight, bias, eps, activation: as for :func:`layer_norm`.

    Returns:
        A function of ``x``; None where it has to be copied first, or is empty.

    Raises:
        ValueError, RuntimeError: see :func:`layer_norm`.
    """
    shape = _empty_output(x, weight, bias, eps, activation).shape
    forward, problem = _library_or_raise(x).norm_forward, _plan(x, activation, eps)
    if not x.is_contiguous() or 0 in shape:
        return None
    problem_address = ctypes.byref(problem)

    def run(x: Tensor) -> Tensor:
        out = x.new_empty(shape)
        addresses = (x.data_ptr(), weight.data_ptr(), bias.data_ptr(), out.data_ptr())
        if forward(problem_address, _TENSORS.pack(*addresses)):
            raise MemoryError("no memory for the scratch of a layer norm")
        return out

    return run


_library = torch.library.Library("vision_backbones", "FRAGMENT")
_library.define(
    "layer_norm(Tensor x, Tensor weight, Tensor bias, float eps, str activation) -> Tensor"
)
_dispatched = torch.ops.vision_backbones.layer_norm.default


@torch.library.impl(_library, "layer_norm", "CPU")
def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, activation: str) -> Tensor:
    out = _empty_output(x, weight, bias, eps, activation)
    library = _library_or_raise(x)
    if out.numel() == 0:
        return out
    x = x.contiguous()
    tensors = _TENSORS.pack(*(t.data_ptr() for t in (x, weight, bias, out)))
    if library.norm_forward(ctypes.byref(_plan(x, activation, eps)), tensors):
        raise MemoryError("no memory for the scratch of a layer norm")
    return out


def _library_or_raise(x: Tensor) -> ctypes.CDLL:
    library, reason = native.load(_KERNEL), unsupported(x.device, x.dtype)
    if library is None or reason is not None:
        raise RuntimeError(f"the kernel of layer norm is not available: {reason}")
    return library


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


def _plan(x: Tensor, activation: str, eps: float) -> _Problem:
    dim, half = x.shape[-1], x.dtype == torch.bfloat16
    pixels = x.numel() // max(1, dim)
    return _problem(pixels, dim, activation, half, eps, torch.get_num_threads())


@functools.lru_cache(maxsize=1024)  # a network has few different ones, and filling them in is slow
def _problem(
    pixels: int, dim: int, activation: str, bfloat16: bool, eps: float, threads: int
) -> _Problem:
    threads = threads_for(pixels * dim, VALUES, threads)
    return _Problem(pixels, dim, ACTIVATIONS.index(activation), bfloat16, eps, threads)
