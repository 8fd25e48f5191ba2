"""Linear layers on the CPU for inference, with what stands around them in one pass.

The kernel (``ops/native/linear.cpp``) is for float32 on a thread or a few, where oneDNN spends much
of a small batch on waiting for weights: it fetches them ahead. There are no gradients.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from ops import native
from ops.depthwise import ACTIVATIONS

__all__ = ["COMBINATIONS", "pack_weight", "packed_linear", "packed_linear_energy", "unsupported"]

# The order is that of `linear::Combination` in ops/native/linear.h.
COMBINATIONS = ("none", "add", "multiply")

_KERNEL = "linear"
_SMALL_MACS = 2e6  # below it one thread is quicker than waking others


class _Problem(ctypes.Structure):
    """``linear::Problem`` of ops/native/linear.h."""

    _fields_ = [
        (name, ctypes.c_int64)
        for name in (
            *("rows", "in_features", "out_features", "in_stride", "out_stride", "other_stride"),
            *("image_rows", "activation", "combination", "threads"),
        )
    ]


class _Tensors(ctypes.Structure):
    """``linear::Tensors`` of ops/native/linear.h."""

    _fields_ = [
        (name, ctypes.c_void_p)
        for name in ("input", "weight", "bias", "other", "scale", "output", "energy")
    ]


def unsupported(device: torch.device, dtype: torch.dtype) -> str | None:
    """``None`` if the kernel takes such tensors, else the reason in words.

    The first call on a machine compiles the kernel, which takes some seconds.
    """
    if device.type != "cpu":
        return f"the kernel runs on the CPU, the tensors are on {device.type}"
    if dtype != torch.float32:
        return f"the kernel takes float32, not {dtype}"
    return native.unavailable_reason(_KERNEL)


def pack_weight(weight: Tensor) -> Tensor:
    """The weight of a linear layer in the kernel's order.

    Args:
        weight: (out_features, in_features) float32 on the CPU.

    Returns:
        A flat tensor, for the CPU of this process only.

    Raises:
        RuntimeError: the kernel is not available here.
    """
    library = _library_or_raise(weight)
    library.linear_packed_size.restype = ctypes.c_int64
    shape = [ctypes.c_int64(n) for n in weight.shape]
    source = weight.detach().contiguous()
    packed = torch.empty(library.linear_packed_size(*shape))
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (source, packed)]
    library.linear_pack(pointers[0], *shape, pointers[1])
    return packed


def packed_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    activation: str = "none",
    other: Tensor | None = None,
    combination: str = "none",
    scale: Tensor | None = None,
) -> Tensor:
    """``activation((x * scale) @ weight.T + bias)``, then ``+ other`` or ``* other``. No gradients.

    Args:
        x: (B, ..., in_features) float32. Rows that lie equally far apart are not copied.
        weight: see :func:`pack_weight`.
        bias: (out_features,); its length tells that of the result.
        activation: one of :data:`ops.depthwise.ACTIVATIONS`; GELU is the exact one.
        other: (B, ..., out_features).
        combination: one of :data:`COMBINATIONS`, what is done with ``other``.
        scale: (B, in_features), by which the inputs are multiplied.

    Returns:
        (B, ..., out_features), contiguous.

    Raises:
        ValueError: shapes that do not go together, an unknown activation or combination.
        RuntimeError: the kernel is not available here (:func:`unsupported` tells beforehand).
    """
    return torch.ops.vision_backbones.packed_linear.default(
        x, weight, bias, activation, other, combination, scale
    )


def packed_linear_energy(
    x: Tensor, weight: Tensor, bias: Tensor, activation: str = "none", scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As :func:`packed_linear`, and the sums of squares of the results, image by image.

    Returns:
        (B, ..., out_features), contiguous, and (B, out_features).

    Raises:
        ValueError, RuntimeError: see :func:`packed_linear`.
    """
    return torch.ops.vision_backbones.packed_linear_energy.default(
        x, weight, bias, activation, scale
    )


_library = torch.library.Library("vision_backbones", "FRAGMENT")
_library.define(
    "packed_linear(Tensor x, Tensor weight, Tensor bias, str activation, Tensor? other, "
    "str combination, Tensor? scale) -> Tensor"
)
_library.define(
    "packed_linear_energy(Tensor x, Tensor weight, Tensor bias, str activation, Tensor? scale)"
    " -> (Tensor, Tensor)"
)


@torch.library.impl(_library, "packed_linear", "CPU")
def _packed_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    activation: str,
    other: Tensor | None,
    combination: str,
    scale: Tensor | None,
) -> Tensor:
    out = _empty_output(x, weight, bias, activation, other, combination, scale)
    _run(x, weight, bias, activation, other, combination, scale, out, None)
    return out


@torch.library.impl(_library, "packed_linear_energy", "CPU")
def _packed_linear_energy(
    x: Tensor, weight: Tensor, bias: Tensor, activation: str, scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    out, energy = _empty_outputs(x, weight, bias, activation, scale)
    _run(x, weight, bias, activation, None, "none", scale, out, energy)
    return out, energy


@torch.library.register_fake("vision_backbones::packed_linear", lib=_library)
def _empty_output(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    activation: str,
    other: Tensor | None,
    combination: str,
    scale: Tensor | None,
) -> Tensor:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {ACTIVATIONS}, got {activation!r}")
    if combination not in COMBINATIONS or (combination == "none") != (other is None):
        raise ValueError(
            f"combination must be one of {COMBINATIONS}, other than 'none' if and only if there "
            f"is something to combine with; got {combination!r}"
        )
    features = x.shape[-1]
    fitting = weight.numel() >= features * bias.shape[0] and weight.numel() % features == 0
    if x.ndim < 2 or weight.ndim != 1 or bias.ndim != 1 or not fitting:
        raise ValueError(
            f"x must be (B, ..., in_features) and weight the packed one of in_features and "
            f"{bias.shape[0]}, got {tuple(x.shape)} and {weight.numel()} packed numbers"
        )
    shape = (*x.shape[:-1], bias.shape[0])
    if other is not None and other.shape != shape:
        raise ValueError(f"other must be {shape}, got {tuple(other.shape)}")
    if scale is not None and scale.shape != (x.shape[0], features):
        raise ValueError(f"scale must be {(x.shape[0], features)}, got {tuple(scale.shape)}")
    return x.new_empty(shape)


@torch.library.register_fake("vision_backbones::packed_linear_energy", lib=_library)
def _empty_outputs(
    x: Tensor, weight: Tensor, bias: Tensor, activation: str, scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    out = _empty_output(x, weight, bias, activation, None, "none", scale)
    return out, x.new_empty(x.shape[0], bias.shape[0])


def _library_or_raise(x: Tensor) -> ctypes.CDLL:
    library = native.load(_KERNEL)
    reason = unsupported(x.device, x.dtype)
    if library is None or reason is not None:
        raise RuntimeError(f"the kernel of linear layers is not available: {reason}")
    return library


def _run(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    activation: str,
    other: Tensor | None,
    combination: str,
    scale: Tensor | None,
    out: Tensor,
    energy: Tensor | None,
) -> None:
    """Into ``out`` and, if there is one, ``energy``."""
    library = _library_or_raise(x)
    if out.numel() == 0:
        return
    x, stride = _rows(x)
    other_stride = 0
    if other is not None:
        other, other_stride = _rows(other)
    if scale is not None:
        scale = scale.contiguous()
    rows = out.numel() // out.shape[-1]
    by_image = scale is not None or energy is not None
    problem = _problem(
        (rows, x.shape[-1], out.shape[-1], stride, out.shape[-1], other_stride),
        rows // x.shape[0] if by_image else 0,
        activation,
        combination,
        torch.get_num_threads(),
    )
    tensors = _Tensors(
        x.data_ptr(),
        weight.data_ptr(),
        bias.data_ptr(),
        None if other is None else other.data_ptr(),
        None if scale is None else scale.data_ptr(),
        out.data_ptr(),
        None if energy is None else energy.data_ptr(),
    )
    if library.linear_forward(ctypes.byref(problem), ctypes.byref(tensors)):
        raise MemoryError("no memory for the scratch of a linear layer")


def _rows(x: Tensor) -> tuple[Tensor, int]:
    """``x``, copied if need be, and the distance of its rows."""
    if x.is_contiguous():
        return x, x.shape[-1]
    stride = _row_stride(x.shape, x.stride())
    return (x.contiguous(), x.shape[-1]) if stride is None else (x, stride)


def _row_stride(shape: Sequence[int], strides: Sequence[int]) -> int | None:
    """The distance from row to row, if they lie equally far apart and are dense themselves."""
    if strides[-1] != 1 and shape[-1] != 1:
        return None
    first, span = None, 0
    for size, stride in zip(reversed(shape[:-1]), reversed(strides[:-1]), strict=True):
        if size == 1:
            continue
        if first is None:
            first = stride
        elif stride != span:
            return None
        span = stride * size
    return shape[-1] if first is None else first


@functools.lru_cache(maxsize=1024)  # a network has few different ones, and filling them in is slow
def _problem(
    sizes: tuple[int, ...], image_rows: int, activation: str, combination: str, threads: int
) -> _Problem:
    rows, in_features, out_features = sizes[:3]
    return _Problem(
        *sizes,
        image_rows,
        ACTIVATIONS.index(activation),
        COMBINATIONS.index(combination),
        1 if rows * in_features * out_features < _SMALL_MACS else threads,
    )
