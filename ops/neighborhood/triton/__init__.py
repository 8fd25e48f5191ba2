"""Neighborhood attention as one fused Triton kernel for one, two and three axes, with gradients.

Hassani et al., "Neighborhood Attention Transformer" (CVPR 2023, https://arxiv.org/abs/2204.07143),
strides and causal axes as in https://arxiv.org/abs/2504.16922. See :mod:`ops.neighborhood` for the
interface of a backend.

The kernels support NVIDIA GPUs with compute capability 8.0 or newer, and any device in Triton's
interpreter (``TRITON_INTERPRET=1`` when triton is first imported), which is how they are tested
without a GPU. Tile sizes are autotuned on first use, once for each kind of call (so call once
before capturing a CUDA graph); under ``torch.use_deterministic_algorithms(True)``, fixed tile sizes
are used instead. There are no atomics, and results are deterministic in both cases. float32
products follow torch's CUDA setting (``torch.set_float32_matmul_precision``): one TF32 product if
it allows TF32, otherwise three, which are as accurate as float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ops.neighborhood._geometry import PARAMS, NAParams
from ops.triton_devices import device_problem

__all__ = ["attend", "unavailable"]

_MAX_HEAD_DIM = 256
_INPUTS = (
    "Tensor query, Tensor key, Tensor value, Tensor? additional_keys, Tensor? additional_values, "
    "Tensor? rpb"
)


def unavailable(query: Tensor, key: Tensor, value: Tensor, *others: Any) -> str | None:
    """None if the kernels support this call, else the reason."""
    if query.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"the kernels compute in float32, float16 or bfloat16, got {query.dtype}"
    problem = device_problem(query)
    if problem is not None:
        return problem
    widest = max(query.shape[-1], value.shape[-1])
    if widest > _MAX_HEAD_DIM:
        return f"head dims go up to {_MAX_HEAD_DIM}, got {widest}"
    # Within a head of an image, the kernels use 32-bit offsets. During export, sizes are symbolic,
    # and such a limit would become a constraint.
    if not torch.compiler.is_compiling() and any(_span(t) >= 2**31 for t in (query, key, value)):
        return "one head of one image spans 2^31 elements or more"
    return None


def _span(tensor: Tensor) -> int:
    """Distance in elements from the first to the last token of a head of an image."""
    return sum(
        (n - 1) * stride
        for n, stride in zip(tensor.shape[1:-2], tensor.stride()[1:-2], strict=True)
    )


def attend(*call: Any) -> tuple[Tensor, Tensor]:
    """Neighborhood attention and its log-sum-exp, differentiable in all tensors.

    Shapes as in :mod:`ops.neighborhood`. Second derivatives are not supported.
    """
    params: NAParams
    *tensors, params = call
    out: Tensor
    lse: Tensor
    out, lse = _attend_op(*tensors, *params.of_operators)
    return out, lse


def _split(arguments: Sequence[Any]) -> tuple[tuple[Any, ...], NAParams]:
    """An operator's arguments as tensors and parameters."""
    *tensors, rpb, kernel_size, stride, dilation, is_causal, scale = arguments
    params = NAParams(tuple(kernel_size), tuple(stride), tuple(dilation), tuple(is_causal), scale)
    return (*tensors, None if rpb is None else rpb.contiguous()), params


@torch.library.custom_op(
    "vision_backbones::triton_neighborhood",
    mutates_args=(),
    schema=f"({_INPUTS}, {PARAMS}) -> (Tensor, Tensor)",
)
def _attend_op(*arguments: Any) -> tuple[Tensor, Tensor]:
    # Imported on first use, since triton is optional.
    from ops.neighborhood.triton import launch

    tensors, params = _split(arguments)
    return launch.forward(*(*tensors, params))


@_attend_op.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    out = query.new_empty(*query.shape[:-1], value.shape[-1])
    return out, query.new_empty(query.shape[:-1], dtype=torch.float32)


@torch.library.custom_op(
    "vision_backbones::triton_neighborhood_backward",
    mutates_args=(),
    schema=(
        f"(Tensor grad_out, Tensor? grad_lse, {_INPUTS}, Tensor out, Tensor lse, {PARAMS}, "
        "bool[] needed) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
)
def _backward_op(grad_out: Tensor, grad_lse: Tensor | None, *arguments: Any) -> tuple[Tensor, ...]:
    from ops.neighborhood.triton import launch

    inputs, (out, lse), (*parameters, needed) = arguments[:6], arguments[6:8], arguments[8:]
    tensors, params = _split((*inputs, *parameters))
    grads = launch.backward(grad_out, grad_lse, *(*tensors, out, lse, params, needed))
    # Operators can't return None; an empty tensor replaces a gradient that is not needed.
    return tuple(out.new_empty(0) if grad is None else grad for grad in grads)


@_backward_op.register_fake
def _(grad_out: Tensor, grad_lse: Tensor | None, *arguments: Any) -> tuple[Tensor, ...]:
    needed = arguments[-1]
    wanted = (needed[0], needed[1], needed[1], needed[2], needed[2], needed[3])
    return tuple(
        tensor.new_empty(tensor.shape) if tensor is not None and want else grad_out.new_empty(0)
        for tensor, want in zip(arguments[:6], wanted, strict=True)
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:6], *output)
    ctx.params = inputs[6:]


def _backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor | None) -> tuple[Any, ...]:
    needs = ctx.needs_input_grad
    needed = [needs[0], needs[1] or needs[2], needs[3] or needs[4], needs[5]]
    grads = _backward_op(grad_out, grad_lse, *ctx.saved_tensors, *ctx.params, needed)
    used = (grad if need else None for grad, need in zip(grads, needs, strict=False))
    return (*used, None, None, None, None, None)


_attend_op.register_autograd(_backward, setup_context=_setup_context)
