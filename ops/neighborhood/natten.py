"""NATTEN's kernels, if it is installed and supports the call.

Generalized neighborhood attention: https://arxiv.org/abs/2504.16922. NATTEN is imported on first
use.
"""

from __future__ import annotations

import functools
from types import ModuleType

import torch
from torch import Tensor

from ops.neighborhood._geometry import Inputs, NAParams

__all__ = ["attend", "is_fused", "unavailable"]


def is_fused(inputs: Inputs) -> bool:
    """Whether NATTEN has a compiled kernel for these tensors; PyPI's package has none."""
    if _library() is None:
        return False
    kernel = _kernel("choose_backend", *inputs[:3])
    return kernel is not None and not kernel.startswith("flex")


def unavailable(inputs: Inputs, params: NAParams) -> str | None:
    """``None`` if NATTEN supports this call on this device, else the reason."""
    if _library() is None:
        return "natten is not installed; `pip install natten`"
    query, key, value, additional_keys, _, rpb = inputs
    if rpb is not None:
        return "natten has no relative position bias"
    if 1 in params.kernel_size:
        return f"natten needs kernel sizes of 2 or more, got {params.kernel_size}"
    if params.scale == 0:
        return "natten treats a scale of 0 as its default"
    if query.device.type == "cpu":
        # There NATTEN runs on torch's flex attention.
        if any(tensor is not None and tensor.requires_grad for tensor in inputs):
            return "natten has no backward on CPU and rejects tensors that require gradients there"
        if torch.compiler.is_compiling():
            return "natten cannot be compiled on CPU"
    whole_map = params.kernel_size == tuple(query.shape[1:-2])
    if not whole_map and _kernel("choose_backend", query, key, value) is None:
        return _no_kernel(query, value)
    # It uses its sequence attention for additional keys and for windows as large as the map.
    if whole_map or additional_keys is not None:
        flat = (tensor.flatten(1, -3) for tensor in (query, key, value))
        causal = whole_map and params.is_causal == (True,)
        if _kernel("choose_fmha_backend", *flat, is_causal=causal, is_varlen=False) is None:
            return _no_kernel(query, value)
    return None


def attend(inputs: Inputs, params: NAParams) -> tuple[Tensor, Tensor]:
    """Neighborhood attention and its lse; shapes as in :mod:`ops.neighborhood`."""
    out, lse = _run(inputs, params)
    differentiable = (inputs.query, inputs.key, inputs.additional_keys)
    if params.return_lse and any(t is not None and t.requires_grad for t in differentiable):
        lse = _with_gradient(lse, inputs, params)
    return out, lse


def _with_gradient(lse: Tensor, inputs: Inputs, params: NAParams) -> Tensor:
    """The lse with its gradient, which NATTEN's kernels lack.

    With the weights p of the attention held constant, scale · query · Σ p·key has the gradient of
    the lse in query and in key; and Σ p·key is the attention with the keys for values.
    """
    query, key, _, additional_keys, *_ = inputs
    constant = None if additional_keys is None else additional_keys.detach()
    of_keys = Inputs(query.detach(), key.detach(), key, constant, additional_keys)
    mean_key, _ = _run(of_keys, params)
    same_gradient = params.scale * (query.to(lse.dtype) * mean_key).sum(-1)
    return lse.detach() + (same_gradient - same_gradient.detach())


def _run(inputs: Inputs, params: NAParams) -> tuple[Tensor, Tensor]:
    library = _library()
    assert library is not None
    attention = (library.na1d, library.na2d, library.na3d)[params.rank - 1]
    # NATTEN rejects a non-contiguous query with additional keys.
    return attention(
        *(tensor.contiguous() for tensor in inputs[:3]),
        kernel_size=params.kernel_size,
        stride=params.stride,
        dilation=params.dilation,
        is_causal=params.is_causal,
        scale=params.scale,
        additional_keys=inputs.additional_keys,
        additional_values=inputs.additional_values,
        return_lse=True,
    )


@torch.compiler.assume_constant_result
def _library() -> ModuleType | None:
    return _import_natten()


@functools.cache
def _import_natten() -> ModuleType | None:
    try:
        import natten
    except ImportError:
        return None
    # Ours under its name (`install_as_natten`) would only lead back here.
    return None if hasattr(natten, "__stands_in__") else natten


def _kernel(chooser: str, *tensors: Tensor, **options: bool) -> str | None:
    """The kernel that NATTEN would choose, or ``None``."""
    from natten import backends

    try:
        return getattr(backends, chooser)(*tensors, torch_compile=False, **options)
    except NotImplementedError:
        return None


def _no_kernel(query: Tensor, value: Tensor) -> str:
    dims = f"head dims {query.shape[-1]} and {value.shape[-1]}"
    return f"natten has no kernel for {dims} in {query.dtype} on {query.device}"
