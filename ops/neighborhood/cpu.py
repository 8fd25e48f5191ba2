"""Neighborhood attention on the CPU by a compiled kernel (``ops/native/neighborhood.cpp``).

https://arxiv.org/abs/2204.07143. Exact, differentiable and deterministic; float32 and bfloat16
tensors. Sums are of float32. On CPUs with AVX512-BF16 but without AMX, queries and keys in bfloat16
are multiplied as they come, and weights are rounded before they multiply values. Memory beyond the
tensors does not grow with the window.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ops import native
from ops.native.eager import is_plain_call
from ops.native.memory import ask_for_huge_pages
from ops.neighborhood._cpu_arguments import (
    ABSENT,
    BACKWARD_TENSORS,
    FORWARD_TENSORS,
    Inputs,
    inner_contiguous,
    per_query,
    strides_with_channels,
    with_channels,
)
from ops.neighborhood._geometry import NAParams

__all__ = ["attend", "needs_grad", "prepare", "supports"]

_KERNEL = "neighborhood"
_MAX_DIM = 512


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
    small calls (below about 2 MFLOP) use one.

    Raises:
        RuntimeError: if the kernel cannot be built here (:func:`supports` tells beforehand).
    """
    inputs: tuple[Any, ...] = (
        *(query, key, value, additional_keys, additional_values, rpb),
        *(params.kernel_size, params.stride, params.dilation, params.is_causal, params.scale),
    )
    if not is_plain_call(inputs[:6]):
        return _forward(*inputs)
    if needs_grad(inputs[:6]):
        return _Differentiable.apply(*inputs)
    lse = _empty_lse(query) if params.return_lse else None
    return _run_forward(lse, *inputs), lse


def needs_grad(tensors: Sequence[Tensor | None]) -> bool:
    """Whether autograd has to know of a call with these tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def prepare(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    additional_keys: Tensor | None,
    additional_values: Tensor | None,
    rpb: Tensor | None,
    params: NAParams,
) -> Callable[..., Tensor] | None:
    """What gives the output for other such tensors, without gradients, in the least time.

    They have the same shapes, strides and dtypes; the number of threads is the same. None where
    tensors have to be copied first, and for calls that models do not repeat.
    """
    contiguous = rpb is None or rpb.dtype == torch.float32 and rpb.is_contiguous()
    if additional_keys is not None or params.return_lse or not contiguous:
        return None
    if any(inner_contiguous(t) is not t for t in (query, key, value)):
        return None
    inputs = Inputs(query, key, value, None, None, rpb)
    geometry = (params.kernel_size, params.stride, params.dilation, params.is_causal, params.scale)
    problem, out = inputs.problem(*geometry), _empty_out(query, value)
    shape = out.shape
    strides = [strides_with_channels(t) for t in (query, key, value, out)]
    forward = _kernel().na_forward

    def run(
        query: Tensor, key: Tensor, value: Tensor, _: None, __: None, rpb: Tensor | None
    ) -> Tensor:
        out = query.new_empty(shape)
        ask_for_huge_pages(out)
        tensors = FORWARD_TENSORS.pack(
            *(query.data_ptr(), *strides[0]),
            *(key.data_ptr(), *strides[1]),
            *(value.data_ptr(), *strides[2]),
            *ABSENT,
            *ABSENT,
            0 if rpb is None else rpb.data_ptr(),
            *(out.data_ptr(), *strides[3]),
            *ABSENT,
        )
        if forward(problem, tensors):
            raise MemoryError("no memory for the scratch of neighborhood attention")
        return out

    return run


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
    inputs = Inputs(query, key, value, additional_keys, additional_values, rpb)
    problem = inputs.problem(kernel_size, stride, dilation, is_causal, scale)
    tensors = FORWARD_TENSORS.pack(*inputs.fields, *with_channels(out), *per_query(lse))
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
    inputs = Inputs(query, key, value, additional_keys, additional_values, rpb)
    problem = inputs.problem(kernel_size, stride, dilation, is_causal, scale)
    grad_out, out, lse = inner_contiguous(grad_out), inner_contiguous(out), lse.contiguous()
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    grad_rpb = None if rpb is None else torch.empty(rpb.shape, dtype=torch.float32)
    tensors = BACKWARD_TENSORS.pack(
        *inputs.fields,
        *with_channels(out),
        *per_query(lse),
        *with_channels(grad_out),
        *per_query(grad_lse),
        *(field for grad in grads[:5] for field in with_channels(grad if grad.numel() else None)),
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
    if needs_grad(inputs[:6]):
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
