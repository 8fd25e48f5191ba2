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

from ops.neighborhood._geometry import PARAMS, Inputs, NAParams
from ops.operators import operator_with_gradients
from ops.triton_devices import problem_of

__all__ = ["attend", "unavailable"]

_MAX_HEAD_DIM = 256


def unavailable(inputs: Inputs, params: NAParams | None = None) -> str | None:
    """None if the kernels support this call, else the reason."""
    query, key, value, *_ = inputs
    problem = problem_of(query)
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


def attend(inputs: Inputs, params: NAParams) -> tuple[Tensor, Tensor]:
    """Neighborhood attention and its log-sum-exp, differentiable in all tensors.

    Shapes as in :mod:`ops.neighborhood`. Second derivatives are not supported.
    """
    out: Tensor
    lse: Tensor
    out, lse = _attend(*inputs, *params.of_operators)
    return out, lse


def _split(arguments: Sequence[Any]) -> tuple[Inputs, NAParams]:
    """An operator's arguments as tensors and parameters."""
    *tensors, rpb, kernel_size, stride, dilation, is_causal, scale = arguments
    params = NAParams(tuple(kernel_size), tuple(stride), tuple(dilation), tuple(is_causal), scale)
    table = None if rpb is None else rpb.contiguous()
    return Inputs._make((*tensors, table)), params


def _forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    # Imported on first use, since triton is optional.
    from ops.neighborhood.triton import launch

    return launch.forward(*_split(arguments))


def _backward(*given: Any, needed: Sequence[bool]) -> tuple[Tensor | None, ...]:
    from ops.neighborhood.triton import launch

    grad_out, grad_lse, out, lse, *arguments = given
    return launch.backward(grad_out, grad_lse, out, lse, *_split(arguments), needed)


def _like(query: Tensor, key: Tensor, value: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    out = query.new_empty(*query.shape[:-1], value.shape[-1])
    return out, query.new_empty(query.shape[:-1], dtype=torch.float32)


_attend = operator_with_gradients(
    "triton_neighborhood",
    "Tensor query, Tensor key, Tensor value, Tensor? additional_keys, Tensor? additional_values, "
    f"Tensor? rpb, {PARAMS}",
    _forward,
    _backward,
    _like,
    results=2,
)
