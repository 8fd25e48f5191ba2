"""The arguments of the compiled kernel of neighborhood attention, as its C interface reads them."""

from __future__ import annotations

import functools
import struct
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = [
    "ABSENT",
    "BACKWARD_TENSORS",
    "FORWARD_TENSORS",
    "Inputs",
    "inner_contiguous",
    "per_query",
    "strides_with_channels",
    "with_channels",
]

# na::Problem of ops/native/problem.h: sizes and the window, in 8 bytes each, then the scale.
_PROBLEM = struct.Struct("=23qd")
# na::Tensor of ops/native/pack.h: an address and strides, in 8 bytes each.
_TENSOR_FIELDS = 6
# na::ForwardTensors of ops/native/forward.h: 5 inputs, rpb, out, lse.
FORWARD_TENSORS = struct.Struct(f"={5 * _TENSOR_FIELDS + 1 + 2 * _TENSOR_FIELDS}q")
# na::BackwardTensors of ops/native/backward.h: 5 inputs, rpb, out, lse, grad_out, grad_lse, the
# gradients of the inputs, that of rpb.
BACKWARD_TENSORS = struct.Struct(f"={5 * _TENSOR_FIELDS + 1 + 9 * _TENSOR_FIELDS + 1}q")

ABSENT = (0,) * _TENSOR_FIELDS  # no tensor
_PADDING = ((0, 0, 0), (0, 0), (0,), ())


def inner_contiguous(t: Tensor) -> Tensor:
    """The tensor, or a copy where its channels do not lie side by side."""
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def with_channels(t: Tensor | None) -> tuple[int, ...]:
    """[B, *S, H, C], or [B, N, H, C], with the axes of S that are missing as Z and Y."""
    return ABSENT if t is None else (t.data_ptr(), *strides_with_channels(t))


def strides_with_channels(t: Tensor) -> tuple[int, ...]:
    """What follows the address in :func:`with_channels`."""
    batch, *spatial, head, _ = t.stride()
    return (batch, *_PADDING[len(spatial)], *spatial, head)


def per_query(t: Tensor | None) -> tuple[int, ...]:
    """[B, *S, H]."""
    if t is None:
        return ABSENT
    batch, *spatial, head = t.stride()
    return (t.data_ptr(), batch, *_PADDING[len(spatial)], *spatial, head)


class Inputs:
    """The inputs as the kernel reads them, kept alive as long as this object."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        additional_keys: Tensor | None,
        additional_values: Tensor | None,
        rpb: Tensor | None,
    ) -> None:
        self.query = inner_contiguous(query)
        self.key = inner_contiguous(key)
        self.value = inner_contiguous(value)
        self.additional_keys, self.additional_values = (
            None if t is None else inner_contiguous(t) for t in (additional_keys, additional_values)
        )
        self.rpb = None if rpb is None else rpb.float().contiguous()
        self.fields = (
            *with_channels(self.query),
            *with_channels(self.key),
            *with_channels(self.value),
            *with_channels(self.additional_keys),
            *with_channels(self.additional_values),
            0 if self.rpb is None else self.rpb.data_ptr(),
        )

    def problem(
        self,
        kernel_size: Sequence[int],
        stride: Sequence[int],
        dilation: Sequence[int],
        is_causal: Sequence[bool],
        scale: float,
    ) -> bytes:
        return _problem(
            self.query.shape,
            self.key.shape[-2],
            self.value.shape[-1],
            0 if self.additional_keys is None else self.additional_keys.shape[1],
            (tuple(kernel_size), tuple(stride), tuple(dilation), tuple(is_causal)),
            self.query.dtype,
            torch.get_num_threads(),
            scale,
        )


@functools.lru_cache(maxsize=256)
def _problem(
    query_shape: Sequence[int],
    kv_heads: int,
    value_dim: int,
    additional: int,
    window: tuple[Sequence[int], ...],
    dtype: torch.dtype,
    threads: int,
    scale: float,
) -> bytes:
    batch, *size, heads, dim = query_shape
    padding = (3 - len(size)) * (1,)
    kernel_size, stride, dilation, is_causal = window
    return _PROBLEM.pack(
        *(batch, heads, kv_heads, dim, value_dim, additional),
        *(*padding, *size),
        *(*padding, *kernel_size),
        *(*padding, *stride),
        *(*padding, *dilation),
        *(*(False for _ in padding), *is_causal),
        dtype == torch.bfloat16,
        threads,
        scale,
    )
