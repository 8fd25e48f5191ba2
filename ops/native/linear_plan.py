"""What calls of the kernel of linear layers come to: sizes, and what their tensors must be."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch

from ops.depthwise import ACTIVATIONS
from ops.native.threads import MACS, threads_for

__all__ = [
    "COMBINATIONS",
    "Layer",
    "Plan",
    "Problem",
    "Tensors",
    "output_shape",
    "packed_inputs",
    "plan_layer",
]

# The order is that of `linear::Combination` in ops/native/linear_problem.h.
COMBINATIONS = ("none", "add", "multiply", "add_scaled")

_TILE_INPUTS = 32  # of bfloat16, that weights are padded to


class Problem(ctypes.Structure):
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
        for name in (
            *("input", "weight", "bias", "other", "scale", "output", "energy"),
            "other_scale",
        )
    ]


class Plan(NamedTuple):
    """What a call with tensors of certain shapes, strides and dtypes comes to."""

    out_shape: tuple[int, ...]
    problem: Problem
    copies_input: bool
    copies_other: bool


# Dtypes of inputs and weight, numbers of the packed weight, shape of the bias, activation,
# combination.
Layer = tuple[torch.dtype, torch.dtype, int, tuple[int, ...], str, str]


def packed_inputs(in_features: int, dtype: torch.dtype) -> int:
    """The inputs that a packed weight has, with those of zero behind its own."""
    return in_features + (-in_features % _TILE_INPUTS if dtype == torch.bfloat16 else 0)


def output_shape(
    shape: tuple[int, ...],
    layer: Layer,
    other: tuple[int, ...] | None,
    scale: tuple[int, ...] | None,
) -> tuple[int, ...]:
    """That of a layer, from the shapes of its input, of what is added and of the scales.

    Raises:
        ValueError: shapes or dtypes that do not go together, an unknown activation or combination.
    """
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
    """From shapes and strides of the input and of what is added; raises as :func:`output_shape`."""
    out_shape = output_shape(shape, layer, None if other is None else other[0], scale)
    *_, activation, combination = layer
    rows = 1
    for size in shape[:-1]:
        rows *= size
    in_stride = _row_stride(shape, strides)
    other_stride = out_shape[-1] if other is None else _row_stride(*other)
    by_image = scale is not None or energy
    problem = Problem(
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
        threads_for(rows * shape[-1] * out_shape[-1], MACS, threads),
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
