"""Two linear layers on the CPU for inference, an activation between them, in one pass.

The kernel is that of :mod:`ops.linear`. There are no gradients.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

import torch
from torch import Tensor

from ops.linear import TENSORS, library_or_raise
from ops.native.eager import is_plain_call, require_dtype
from ops.native.linear_plan import Layer, Plan, Tensors, output_shape, plan_layer

__all__ = ["packed_mlp", "prepare"]


def packed_mlp(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    activation: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    """``activation(x @ weight1.T + bias1) @ weight2.T + bias2 + residual``. No gradients.

    Some rows at a time go through both layers, so that what is between them stays in the cache.

    Args:
        x: (B, ..., in_features), float32 or bfloat16 as the weights.
        weight1, weight2: see :func:`ops.linear.pack_weight`.
        bias1: (hidden,) float32.
        bias2: (out_features,) float32.
        activation: as for :func:`ops.linear.packed_linear`.
        residual: (B, ..., out_features), in the dtype of ``x``.

    Returns:
        (B, ..., out_features), contiguous.

    Raises:
        ValueError, RuntimeError: see :func:`ops.linear.packed_linear`.
    """
    plain = is_plain_call((x, weight1, bias1, weight2, bias2, residual))
    forward = _packed_mlp if plain else _dispatched
    return forward(x, weight1, bias1, weight2, bias2, activation, residual)


def prepare(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    activation: str = "none",
    residual: Tensor | None = None,
) -> Callable[[Tensor, Tensor | None], Tensor] | None:
    """What does as :func:`packed_mlp` for such ``x`` and ``residual`` in the least time.

    See :func:`ops.linear.prepare`; the arguments are those of :func:`packed_mlp`.

    Returns:
        A function of ``x`` and ``residual``; None where they have to be copied first, or are empty.

    Raises:
        ValueError, RuntimeError: see :func:`ops.linear.packed_linear`.
    """
    first, second = _plans_of(x, weight1, bias1, weight2, bias2, activation, residual)
    copies = first.copies_input or (residual is not None and second.copies_other)
    shape = second.out_shape
    if copies or 0 in shape:
        return None
    forward = library_or_raise(x).linear_forward_pair
    problems = ctypes.byref(first.problem), ctypes.byref(second.problem)

    def run(x: Tensor, residual: Tensor | None) -> Tensor:
        out = x.new_empty(shape)
        other = 0 if residual is None else residual.data_ptr()
        before = (x.data_ptr(), weight1.data_ptr(), bias1.data_ptr(), 0, 0, 0, 0, 0)
        after = (0, weight2.data_ptr(), bias2.data_ptr(), other, 0, out.data_ptr(), 0, 0)
        if forward(problems[0], TENSORS.pack(*before), problems[1], TENSORS.pack(*after)):
            raise MemoryError("no memory for the scratch of two linear layers")
        return out

    return run


_library = torch.library.Library("vision_backbones", "FRAGMENT")
_library.define(
    "packed_mlp(Tensor x, Tensor weight1, Tensor bias1, Tensor weight2, Tensor bias2, "
    "str activation, Tensor? residual) -> Tensor"
)
_dispatched = torch.ops.vision_backbones.packed_mlp.default


@torch.library.impl(_library, "packed_mlp", "CPU")
def _packed_mlp(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    activation: str,
    residual: Tensor | None,
) -> Tensor:
    first, second = _plans_of(x, weight1, bias1, weight2, bias2, activation, residual)
    library = library_or_raise(x)
    out = x.new_empty(second.out_shape)
    if out.numel() == 0:
        return out
    x = x.contiguous() if first.copies_input else x
    if residual is not None and second.copies_other:
        residual = residual.contiguous()
    other = None if residual is None else residual.data_ptr()
    before = Tensors(x.data_ptr(), weight1.data_ptr(), bias1.data_ptr())
    after = Tensors(None, weight2.data_ptr(), bias2.data_ptr(), other, None, out.data_ptr())
    if library.linear_forward_pair(
        ctypes.byref(first.problem),
        ctypes.byref(before),
        ctypes.byref(second.problem),
        ctypes.byref(after),
    ):
        raise MemoryError("no memory for the scratch of two linear layers")
    return out


@torch.library.register_fake("vision_backbones::packed_mlp", lib=_library)
def _empty_output(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    activation: str,
    residual: Tensor | None,
) -> Tensor:
    layers = (
        (x.dtype, weight1.dtype, weight1.numel(), bias1.shape, activation, "none"),
        _second_layer(x.dtype, weight2.dtype, weight2.numel(), bias2.shape, residual is not None),
    )
    hidden = output_shape(x.shape, layers[0], None, None)
    return x.new_empty(
        output_shape(hidden, layers[1], None if residual is None else residual.shape, None)
    )


def _second_layer(
    dtype: torch.dtype,
    weight_dtype: torch.dtype,
    weights: int,
    bias: tuple[int, ...],
    has_residual: bool,
) -> Layer:
    return dtype, weight_dtype, weights, bias, "none", "add" if has_residual else "none"


def _plans_of(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    activation: str,
    residual: Tensor | None,
) -> tuple[Plan, Plan]:
    require_dtype(torch.float32, bias1=bias1, bias2=bias2)
    require_dtype(x.dtype, residual=residual)
    return _plans(
        (x.shape, x.stride(), x.dtype),
        (weight1.dtype, weight1.numel(), bias1.shape, activation),
        (weight2.dtype, weight2.numel(), bias2.shape),
        None if residual is None else (residual.shape, residual.stride()),
        torch.get_num_threads(),
    )


@functools.lru_cache(maxsize=1024)
def _plans(
    x: tuple[tuple[int, ...], tuple[int, ...], torch.dtype],
    first: tuple[torch.dtype, int, tuple[int, ...], str],
    second: tuple[torch.dtype, int, tuple[int, ...]],
    residual: tuple[tuple[int, ...], tuple[int, ...]] | None,
    threads: int,
) -> tuple[Plan, Plan]:
    shape, strides, dtype = x
    expand = plan_layer(shape, strides, (dtype, *first, "none"), None, None, False, threads)
    hidden = torch.empty(expand.out_shape, device="meta")
    layer = _second_layer(dtype, *second, residual is not None)
    return expand, plan_layer(hidden.shape, hidden.stride(), layer, residual, None, False, threads)
