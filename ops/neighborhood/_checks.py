"""Argument checks of neighborhood attention."""

from __future__ import annotations

import numbers
from collections.abc import Sequence

import torch
from torch import Tensor

from ops.arguments import require_shapes
from ops.neighborhood._geometry import Inputs, NAParams


def per_axis_int(name: str, value: int | Sequence[int], rank: int) -> tuple[int, ...]:
    """A positive integer per axis, from an integer or a sequence of length ``rank``.

    Raises:
        ValueError: anything else.
    """
    values = tuple(value) if isinstance(value, Sequence) else (value,) * rank
    if len(values) != rank or not all(_is_int(v) and v >= 1 for v in values):
        raise ValueError(
            f"{name} must be an integer of 1 or more, or one for each of {rank} axes, got {value!r}"
        )
    return tuple(int(v) for v in values)


def per_axis_bool(name: str, value: bool | Sequence[bool] | None, rank: int) -> tuple[bool, ...]:
    """A bool per axis, from a bool, a sequence of length ``rank``, or ``None`` for false.

    Raises:
        ValueError: anything else.
    """
    values = tuple(value) if isinstance(value, Sequence) else (value or False,) * rank
    if len(values) != rank or not all(isinstance(v, bool) for v in values):
        raise ValueError(f"{name} must be a bool, or one for each of {rank} axes, got {value!r}")
    return values


def resolve_params(
    size: Sequence[int],
    head_dim: int,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int],
    dilation: int | Sequence[int],
    is_causal: bool | Sequence[bool] | None,
    scale: float | None,
    return_lse: bool,
) -> NAParams:
    """The parameters of a call on a map of ``size``, one entry per axis.

    Raises:
        ValueError: a parameter of the wrong type or length, a window larger than the map
            (kernel_size · dilation > size), or a stride larger than the kernel size.
    """
    rank = len(size)
    kernel_sizes = per_axis_int("kernel_size", kernel_size, rank)
    strides = per_axis_int("stride", stride, rank)
    dilations = per_axis_int("dilation", dilation, rank)
    for axis, (n, k, s, d) in enumerate(zip(size, kernel_sizes, strides, dilations, strict=True)):
        if k * d > n:
            raise ValueError(
                f"kernel_size · dilation must not exceed the size of the map, got {k} · {d} = "
                f"{k * d} > {n} along axis {axis}"
            )
        if s > k:
            raise ValueError(f"stride must not exceed kernel_size, got {s} > {k} along axis {axis}")
    if scale is not None and not isinstance(scale, numbers.Real):
        raise ValueError(f"scale must be a number or None, got {scale!r}")
    return NAParams(
        kernel_sizes,
        strides,
        dilations,
        per_axis_bool("is_causal", is_causal, rank),
        max(1, head_dim) ** -0.5 if scale is None else float(scale),
        return_lse,
    )


def check_tensors(rank: int, inputs: Inputs) -> None:
    """Raise ValueError unless all but rpb have compatible shapes with ``rank`` map axes."""
    query, key, value, additional_keys, additional_values, _ = inputs
    of_map = ("batch length", "batch height width", "batch depth height width")[rank - 1]
    sizes = require_shapes(
        query=(query, f"{of_map} heads dim"),
        key=(key, f"{of_map} kv_heads dim"),
        value=(value, f"{of_map} kv_heads value_dim"),
        additional_keys=(additional_keys, "batch additional kv_heads dim"),
        additional_values=(additional_values, "batch additional kv_heads value_dim"),
    )
    if not query.is_floating_point():
        raise ValueError(f"query must be floating-point, got {query.dtype}")
    for name, tensor in zip(Inputs._fields[1:5], inputs[1:5], strict=True):
        if tensor is not None:
            check_same_kind(name, tensor, query)
    heads, kv_heads = sizes["heads"], sizes["kv_heads"]
    if kv_heads == 0 or heads % kv_heads != 0:
        raise ValueError(
            f"the heads of key and value must divide those of query, got {kv_heads} and {heads}"
        )
    if (additional_keys is None) != (additional_values is None):
        raise ValueError("give both additional_keys and additional_values, or neither")


def check_rpb(rpb: Tensor, query: Tensor, params: NAParams) -> None:
    """Raise ValueError unless ``rpb`` is a floating (heads, 2·k₁−1, …) on the query's device."""
    expected = (query.shape[-2], *(2 * k - 1 for k in params.kernel_size))
    if tuple(rpb.shape) != expected:
        raise ValueError(
            f"rpb must be (heads, 2·kernel_size−1 of each axis) = {expected}, got "
            f"{tuple(rpb.shape)}"
        )
    if not rpb.is_floating_point() or rpb.device != query.device:
        raise ValueError(
            f"rpb must be floating-point on {query.device}, got {rpb.dtype} on {rpb.device}"
        )


def check_additional(name: str, tensor: Tensor, beside: Tensor) -> None:
    """Raise ValueError unless ``tensor``, (B, H, N, D), fits to ``beside``, (B, H, *S, D)."""
    sizes = {"batch": beside.shape[0], "heads": beside.shape[1], "dim": beside.shape[-1]}
    require_shapes(sizes, **{name: (tensor, "batch heads additional dim")})
    check_same_kind(name, tensor, beside)


def check_same_kind(name: str, tensor: Tensor, beside: Tensor) -> None:
    """Raise ValueError unless both tensors have the same dtype and device."""
    if tensor.dtype != beside.dtype or tensor.device != beside.device:
        raise ValueError(
            f"{name} must be {beside.dtype} on {beside.device}, got {tensor.dtype} on "
            f"{tensor.device}"
        )


def _is_int(value: object) -> bool:
    # Its own type first: the compiler of torch 2.8 cannot look for abstract ones.
    whole = type(value) is int or isinstance(value, numbers.Integral | torch.SymInt)
    return whole and not isinstance(value, bool)
