"""Neighborhood attention on the CPU by a compiled kernel (``ops/native/neighborhood.cpp``).

https://arxiv.org/abs/2204.07143. Exact, differentiable and deterministic; float32 and bfloat16
tensors, float32 arithmetic. Memory beyond the tensors does not grow with the window.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ops import native
from ops.native.eager import is_plain_call
from ops.native.memory import ask_for_huge_pages
from ops.neighborhood._geometry import NAParams

__all__ = ["attend", "supports"]

_KERNEL = "neighborhood"
_MAX_DIM = 512


# na::Problem of ops/native/problem.h: sizes and the window, in 8 bytes each, then the scale.
_PROBLEM = struct.Struct("=23qd")
# na::Tensor of ops/native/pack.h: an address and strides, in 8 bytes each.
_TENSOR_FIELDS = 6
# na::ForwardTensors of ops/native/forward.h: 5 inputs, rpb, out, lse.
_FORWARD_TENSORS = struct.Struct(f"={5 * _TENSOR_FIELDS + 1 + 2 * _TENSOR_FIELDS}q")
# na::BackwardTensors of ops/native/backward.h: 5 inputs, rpb, out, lse, grad_out, grad_lse, the
# gradients of the inputs, that of rpb.
_BACKWARD_TENSORS = struct.Struct(f"={5 * _TENSOR_FIELDS + 1 + 9 * _TENSOR_FIELDS + 1}q")


def supports(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    additional_keys: Tensor | None,
    additional_values: Tensor | None,
    rpb: Tensor | None,
    params: NAParams,
) -> str | None:
    """``None`` if this kernel can do the call, else the reason in words.

    The first call on a machine compiles the kernel, which takes some seconds.
    """
    if query.device.type != "cpu":
        return f"the compiled kernel runs on the CPU, the tensors are on {query.device.type}"
    if query.dtype not in (torch.float32, torch.bfloat16):
        return f"the compiled kernel takes float32 and bfloat16, not {query.dtype}"
    for dim in (query.shape[-1], value.shape[-1]):
        if dim > _MAX_DIM:
            return f"the compiled kernel takes head dims up to {_MAX_DIM}, not {dim}"
    return _unavailable_reason()


@torch.compiler.assume_constant_result
def _unavailable_reason() -> str | None:
    return native.unavailable_reason(_KERNEL)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    additional_keys: Tensor | None,
    additional_values: Tensor | None,
    rpb: Tensor | None,
    params: NAParams,
) -> tuple[Tensor, Tensor | None]:
    """Neighborhood attention, differentiable in every tensor; shapes as in ``ops.neighborhood``.

    Results do not depend on the number of threads, which is that of ``torch.get_num_threads()``;
    small calls (below about 50 MFLOP) use one.

    Raises:
        RuntimeError: if the kernel cannot be built here (:func:`supports` tells beforehand).
    """
    inputs: tuple[Any, ...] = (
        *(query, key, value, additional_keys, additional_values, rpb),
        *(params.kernel_size, params.stride, params.dilation, params.is_causal, params.scale),
    )
    if not is_plain_call(inputs[:6]):
        return _forward(*inputs)
    if _needs_grad(inputs):
        return _Differentiable.apply(*inputs)
    lse = _empty_lse(query) if params.return_lse else None
    return _run_forward(lse, *inputs), lse


def _needs_grad(inputs: Sequence[Any]) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs[:6])


# The operators are registered by schema and dispatch key, which costs half the overhead of
# `torch.library.custom_op`; a small map takes not much longer than the overhead.
_GEOMETRY = "int[] kernel_size, int[] stride, int[] dilation, bool[] is_causal, float scale"
_INPUT_SCHEMA = (
    "Tensor query, Tensor key, Tensor value, "
    "Tensor? additional_keys, Tensor? additional_values, Tensor? rpb, " + _GEOMETRY
)
_library = torch.library.Library("vision_backbones", "FRAGMENT")
_library.define(f"na_cpu_forward({_INPUT_SCHEMA}) -> (Tensor, Tensor)")
_library.define(
    f"na_cpu_backward(Tensor grad_out, Tensor? grad_lse, Tensor out, Tensor lse, {_INPUT_SCHEMA})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_forward = torch.ops.vision_backbones.na_cpu_forward.default
_backward = torch.ops.vision_backbones.na_cpu_backward.default


@torch.library.impl(_library, "na_cpu_forward", "CPU")
def _forward_kernel(*inputs: Any) -> tuple[Tensor, Tensor]:
    lse = _empty_lse(inputs[0])
    return _run_forward(lse, *inputs), lse


def _run_forward(
    lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    additional_keys: Tensor | None,
    additional_values: Tensor | None,
    rpb: Tensor | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    is_causal: Sequence[bool],
    scale: float,
) -> Tensor:
    """The output; ``lse`` is filled where there is one."""
    out = _empty_out(query, value)
    if out.numel() == 0:
        return out
    ask_for_huge_pages(out)
    inputs = _Inputs(query, key, value, additional_keys, additional_values, rpb)
    problem = inputs.problem(kernel_size, stride, dilation, is_causal, scale)
    tensors = _FORWARD_TENSORS.pack(*inputs.fields, *_with_channels(out), *_per_query(lse))
    if _kernel().na_forward(problem, tensors):
        raise MemoryError("no memory for the scratch of neighborhood attention")
    return out


@torch.library.register_fake("vision_backbones::na_cpu_forward", lib=_library)
def _forward_shapes(
    query: Tensor, key: Tensor, value: Tensor, *rest: Any, **named: Any
) -> tuple[Tensor, Tensor]:
    return _empty_out(query, value), _empty_lse(query)


@torch.library.impl(_library, "na_cpu_backward", "CPU")
def _backward_kernel(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    additional_keys: Tensor | None,
    additional_values: Tensor | None,
    rpb: Tensor | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    is_causal: Sequence[bool],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    grads = _empty_gradients(query, key, value, additional_keys, additional_values, rpb)
    if out.numel() == 0:
        return tuple(grad.zero_() for grad in grads)  # type: ignore[return-value]
    ask_for_huge_pages(*grads[:3])
    inputs = _Inputs(query, key, value, additional_keys, additional_values, rpb)
    problem = inputs.problem(kernel_size, stride, dilation, is_causal, scale)
    grad_out, out, lse = _inner_contiguous(grad_out), _inner_contiguous(out), lse.contiguous()
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    grad_rpb = None if rpb is None else torch.empty(rpb.shape, dtype=torch.float32)
    tensors = _BACKWARD_TENSORS.pack(
        *inputs.fields,
        *_with_channels(out),
        *_per_query(lse),
        *_with_channels(grad_out),
        *_per_query(grad_lse),
        *(field for grad in grads[:5] for field in _with_channels(grad if grad.numel() else None)),
        0 if grad_rpb is None else grad_rpb.data_ptr(),
    )
    if _kernel().na_backward(problem, tensors):
        raise MemoryError("no memory for the scratch of neighborhood attention")
    return (*grads[:5], grads[5] if grad_rpb is None else grad_rpb.to(grads[5].dtype))


@torch.library.register_fake("vision_backbones::na_cpu_backward", lib=_library)
def _backward_shapes(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    additional_keys: Tensor | None,
    additional_values: Tensor | None,
    rpb: Tensor | None,
    *rest: Any,
    **named: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _empty_gradients(query, key, value, additional_keys, additional_values, rpb)


class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        if is_plain_call(inputs[:6]):
            out, lse = _forward_kernel(*inputs)
        else:
            with torch._C._AutoDispatchBelowAutograd():
                out, lse = _forward(*inputs)
        ctx.save_for_backward(*inputs[:6], out, lse)
        ctx.geometry = inputs[6:]
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
        *inputs, out, lse = ctx.saved_tensors
        if grad_out is None:
            if grad_lse is None:
                return (None,) * 11
            grad_out = torch.zeros_like(out)
        plain = is_plain_call((grad_out, grad_lse, out, lse, *inputs))
        backward = _backward_kernel if plain else _backward
        grads = backward(grad_out, grad_lse, out, lse, *inputs, *ctx.geometry)
        wanted = (
            grad if tensor is not None and needed else None
            for grad, tensor, needed in zip(grads, inputs, ctx.needs_input_grad, strict=False)
        )
        return (*wanted, None, None, None, None, None)


@torch.library.impl(_library, "na_cpu_forward", "AutogradCPU")
def _forward_autograd(*inputs: Any) -> tuple[Tensor, Tensor]:
    if _needs_grad(inputs):
        return _Differentiable.apply(*inputs)
    with torch._C._AutoDispatchBelowAutograd():
        return _forward(*inputs)


def _kernel() -> ctypes.CDLL:
    library = native.load(_KERNEL)
    if library is None:
        reason = native.unavailable_reason(_KERNEL)
        raise RuntimeError(f"the CPU kernel of neighborhood attention is not available: {reason}")
    return library


def _empty_out(query: Tensor, value: Tensor) -> Tensor:
    return query.new_empty((*query.shape[:-1], value.shape[-1]))


def _empty_lse(query: Tensor) -> Tensor:
    return query.new_empty(query.shape[:-1], dtype=torch.float32)


def _empty_gradients(
    query: Tensor, key: Tensor, value: Tensor, *optional: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    # An operator cannot return None: an absent gradient is a tensor without elements.
    additional_keys, additional_values, rpb = (
        query.new_empty(0) if t is None else t.new_empty(t.shape) for t in optional
    )
    return (
        query.new_empty(query.shape),
        key.new_empty(key.shape),
        value.new_empty(value.shape),
        additional_keys,
        additional_values,
        rpb,
    )


def _inner_contiguous(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


_ABSENT = (0,) * _TENSOR_FIELDS
_PADDING = ((0, 0, 0), (0, 0), (0,), ())


def _with_channels(t: Tensor | None) -> tuple[int, ...]:
    """[B, *S, H, C], or [B, N, H, C], with the axes of S that are missing as Z and Y."""
    if t is None:
        return _ABSENT
    batch, *spatial, head, _ = t.stride()
    return (t.data_ptr(), batch, *_PADDING[len(spatial)], *spatial, head)


def _per_query(t: Tensor | None) -> tuple[int, ...]:
    """[B, *S, H]."""
    if t is None:
        return _ABSENT
    batch, *spatial, head = t.stride()
    return (t.data_ptr(), batch, *_PADDING[len(spatial)], *spatial, head)


class _Inputs:
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
        self.query = _inner_contiguous(query)
        self.key = _inner_contiguous(key)
        self.value = _inner_contiguous(value)
        self.additional_keys, self.additional_values = (
            None if t is None else _inner_contiguous(t)
            for t in (additional_keys, additional_values)
        )
        self.rpb = None if rpb is None else rpb.float().contiguous()
        self.fields = (
            *_with_channels(self.query),
            *_with_channels(self.key),
            *_with_channels(self.value),
            *_with_channels(self.additional_keys),
            *_with_channels(self.additional_values),
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
