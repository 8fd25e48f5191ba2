"""Linear layers on the CPU for inference, with what stands around them in one pass.

The kernel (``ops/native/linear.cpp``) is for a thread or a few, where oneDNN spends much of a small
batch on waiting for weights: it fetches them ahead. There are no gradients.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ops import native
from ops.depthwise import ACTIVATIONS
from ops.native.eager import is_plain_call

__all__ = [
    "COMBINATIONS",
    "pack_weight",
    "packed_inputs",
    "packed_linear",
    "packed_linear_energy",
    "unsupported",
]

# The order is that of `linear::Combination` in ops/native/linear_problem.h.
COMBINATIONS = ("none", "add", "multiply")

_KERNEL = "linear"
_SMALL_MACS = 2e6  # below it one thread is quicker than waking others
_TILE_INPUTS = 32  # of bfloat16, that weights are padded to


class _Problem(ctypes.Structure):
    """``linear::Problem`` of ops/native/linear_problem.h."""

    _fields_ = [
        (name, ctypes.c_int64)
        for name in (
            *("rows", "in_features", "out_features", "in_stride", "out_stride", "other_stride"),
            *("image_rows", "activation", "combination", "bfloat16", "threads"),
        )
    ]


class Tensors(ctypes.Structure):
    """``linear::Tensors`` of ops/native/linear_problem.h."""

    _fields_ = [
        (name, ctypes.c_void_p)
        for name in ("input", "weight", "bias", "other", "scale", "output", "energy")
    ]


class Plan(NamedTuple):
    """What a call with tensors of certain shapes, strides and dtypes comes to."""

    out_shape: tuple[int, ...]
    problem: _Problem
    copies_input: bool
    copies_other: bool


# Dtypes of inputs and weight, numbers of the packed weight, shape of the bias, activation,
# combination.
Layer = tuple[torch.dtype, torch.dtype, int, tuple[int, ...], str, str]


def unsupported(
    device: torch.device, dtype: torch.dtype, *, with_bfloat16: bool = False
) -> str | None:
    """``None`` if the kernel takes such tensors, else the reason in words.

    The first call on a machine compiles the kernel, which takes some seconds.

    Args:
        with_bfloat16: whether bfloat16 will do beside float32; it needs a CPU with AMX or
            AVX512-BF16.
    """
    if device.type != "cpu":
        return f"the kernel runs on the CPU, the tensors are on {device.type}"
    if dtype != torch.float32 and not (with_bfloat16 and dtype == torch.bfloat16):
        return f"the kernel takes float32, not {dtype}"
    library = native.load(_KERNEL)
    if library is not None and dtype == torch.bfloat16 and not library.linear_takes_bfloat16():
        return "the kernel takes bfloat16 on CPUs with AVX512-BF16 or AMX only"
    return native.unavailable_reason(_KERNEL)


def pack_weight(weight: Tensor) -> Tensor:
    """The weight of a linear layer in the kernel's order.

    Args:
        weight: (out_features, in_features), float32 or bfloat16, on the CPU.

    Returns:
        A flat tensor of the same dtype, for the CPU of this process only.

    Raises:
        ValueError: not a matrix.
        RuntimeError: the kernel is not available here.
    """
    if weight.ndim != 2:
        raise ValueError(f"weight must be (out_features, in_features), got {tuple(weight.shape)}")
    library = library_or_raise(weight)
    library.linear_packed_size.restype = ctypes.c_int64
    half = weight.dtype == torch.bfloat16
    shape = [ctypes.c_int64(n) for n in weight.shape]
    source = weight.detach().contiguous()
    packed = source.new_empty(library.linear_packed_size(*shape, half))
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (source, packed)]
    library.linear_pack(pointers[0], *shape, half, pointers[1])
    return packed


def packed_inputs(in_features: int, dtype: torch.dtype) -> int:
    """The inputs that a packed weight has, with those of zero behind its own."""
    return in_features + (-in_features % _TILE_INPUTS if dtype == torch.bfloat16 else 0)


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
        x: (B, ..., in_features), float32 or bfloat16 as the weight. Rows that lie equally far apart
            are not copied.
        weight: see :func:`pack_weight`.
        bias: (out_features,) float32; its length tells that of the result.
        activation: one of :data:`ops.depthwise.ACTIVATIONS`; GELU is the exact one.
        other: (B, ..., out_features).
        combination: one of :data:`COMBINATIONS`, what is done with ``other``.
        scale: (B, in_features) float32, by which the inputs are multiplied.

    Returns:
        (B, ..., out_features), contiguous; sums are of float32.

    Raises:
        ValueError: shapes or dtypes that do not go together, an unknown activation or combination.
        RuntimeError: the kernel is not available here (:func:`unsupported` tells beforehand).
    """
    forward = _linear if is_plain_call((x, weight, bias, other, scale)) else _dispatched
    return forward(x, weight, bias, activation, other, combination, scale, False)[0]


def packed_linear_energy(
    x: Tensor, weight: Tensor, bias: Tensor, activation: str = "none", scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As :func:`packed_linear`, and the sums of squares of the results, image by image.

    Returns:
        (B, ..., out_features), contiguous, and (B, out_features) float32.

    Raises:
        ValueError, RuntimeError: see :func:`packed_linear`.
    """
    forward = _linear if is_plain_call((x, weight, bias, scale)) else _dispatched
    out, energy = forward(x, weight, bias, activation, None, "none", scale, True)
    return out, energy


_library = torch.library.Library("vision_backbones", "FRAGMENT")
_library.define(
    "packed_linear(Tensor x, Tensor weight, Tensor bias, str activation, Tensor? other, "
    "str combination, Tensor? scale, bool energy) -> Tensor[]"
)
_dispatched = torch.ops.vision_backbones.packed_linear.default


@torch.library.impl(_library, "packed_linear", "CPU")
def _linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    activation: str,
    other: Tensor | None,
    combination: str,
    scale: Tensor | None,
    energy: bool,
) -> list[Tensor]:
    plan = plan_layer(
        x.shape,
        x.stride(),
        (x.dtype, weight.dtype, weight.numel(), bias.shape, activation, combination),
        None if other is None else (other.shape, other.stride()),
        None if scale is None else scale.shape,
        energy,
        torch.get_num_threads(),
    )
    outs = [x.new_empty(plan.out_shape)]
    if energy:
        outs.append(bias.new_empty(x.shape[0], bias.shape[0]))
    x = x.contiguous() if plan.copies_input else x
    if other is not None and plan.copies_other:
        other = other.contiguous()
    _run(plan.problem, x, weight, bias, other, scale, *outs)
    return outs


@torch.library.register_fake("vision_backbones::packed_linear", lib=_library)
def _empty_outputs(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    activation: str,
    other: Tensor | None,
    combination: str,
    scale: Tensor | None,
    energy: bool,
) -> list[Tensor]:
    shape = output_shape(
        x.shape,
        (x.dtype, weight.dtype, weight.numel(), bias.shape, activation, combination),
        None if other is None else other.shape,
        None if scale is None else scale.shape,
    )
    outs = [x.new_empty(shape)]
    return [*outs, bias.new_empty(x.shape[0], bias.shape[0])] if energy else outs


def output_shape(
    shape: tuple[int, ...],
    layer: Layer,
    other: tuple[int, ...] | None,
    scale: tuple[int, ...] | None,
) -> tuple[int, ...]:
    dtype, weight_dtype, weights, bias, activation, combination = layer
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {ACTIVATIONS}, got {activation!r}")
    if combination not in COMBINATIONS or (combination == "none") != (other is None):
        raise ValueError(
            f"combination must be one of {COMBINATIONS}, other than 'none' if and only if there "
            f"is something to combine with; got {combination!r}"
        )
    if dtype != weight_dtype:
        raise ValueError(f"x is {dtype} and its weight {weight_dtype}; they must be the same")
    features = packed_inputs(shape[-1], dtype)
    fits = len(bias) == 1 and weights >= features * bias[0] and weights % features == 0
    if len(shape) < 2 or not fits:
        raise ValueError(
            f"x must be (B, ..., in_features) and weight the packed one of in_features and "
            f"{bias[0]}, got {tuple(shape)} and {weights} packed numbers"
        )
    out_shape = (*shape[:-1], bias[0])
    if other is not None and other != out_shape:
        raise ValueError(f"other must be {out_shape}, got {tuple(other)}")
    if scale is not None and scale != (shape[0], shape[-1]):
        raise ValueError(f"scale must be {(shape[0], shape[-1])}, got {tuple(scale)}")
    return out_shape


@functools.lru_cache(maxsize=1024)  # a network has few different ones, and to plan is slow
def plan_layer(
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    layer: Layer,
    other: tuple[tuple[int, ...], tuple[int, ...]] | None,
    scale: tuple[int, ...] | None,
    energy: bool,
    threads: int,
) -> Plan:
    out_shape = output_shape(shape, layer, None if other is None else other[0], scale)
    *_, activation, combination = layer
    rows = 1
    for size in shape[:-1]:
        rows *= size
    in_stride = _row_stride(shape, strides)
    other_stride = out_shape[-1] if other is None else _row_stride(*other)
    by_image = scale is not None or energy
    problem = _Problem(
        rows,
        shape[-1],
        out_shape[-1],
        shape[-1] if in_stride is None else in_stride,
        out_shape[-1],
        out_shape[-1] if other_stride is None else other_stride,
        rows // max(1, shape[0]) if by_image else 0,
        ACTIVATIONS.index(activation),
        COMBINATIONS.index(combination),
        layer[0] == torch.bfloat16,
        1 if rows * shape[-1] * out_shape[-1] < _SMALL_MACS else threads,
    )
    return Plan(out_shape, problem, in_stride is None, other_stride is None)


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


def library_or_raise(x: Tensor) -> ctypes.CDLL:
    reason = unsupported(x.device, x.dtype, with_bfloat16=True)
    library = native.load(_KERNEL)
    if library is None or reason is not None:
        raise RuntimeError(f"the kernel of linear layers is not available: {reason}")
    return library


def _run(
    problem: _Problem,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    other: Tensor | None,
    scale: Tensor | None,
    out: Tensor,
    energy: Tensor | None = None,
) -> None:
    """Into ``out`` and, if there is one, ``energy``.

    Raises:
        RuntimeError: the kernel is not available here.
    """
    library = library_or_raise(x)
    if out.numel() == 0:
        if energy is not None:
            energy.zero_()
        return
    if scale is not None:
        scale = scale.float().contiguous()
    tensors = Tensors(
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
