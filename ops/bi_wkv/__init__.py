"""Bi-WKV, Vision-RWKV's bidirectional scan: its formula, or what the published kernel computes.

https://arxiv.org/abs/2403.02308. Each backend, see :mod:`ops.backends`, is a module with a
differentiable ``attend``.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from ops.arguments import checked, require_like
from ops.autocast import without_autocast
from ops.backends import backend_of_scan
from ops.bi_wkv import chunked, cpu, reference, triton

__all__ = ["BACKENDS", "bi_wkv"]

BACKENDS: dict[str, ModuleType] = {
    "reference": reference,
    "chunked": chunked,
    "cpu": cpu,
    "triton": triton,
}


@checked(ranks={"key": 3})
def bi_wkv(
    key: Tensor,
    value: Tensor,
    decay: Tensor,
    first: Tensor,
    segments: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """The per-channel mean of all values, weighted by keys and by distance along the sequence.

    In the output of token t, token i has the weight exp(keyᵢ − decay · (|t − i| − 1)), and t itself
    exp(first + keyₜ). A negative decay favours distant tokens. The cost is O(T), except for
    ``backend="reference"``.

    The CUDA kernel that the published networks were trained with computes something else: tokens
    are divided into ``segments`` of ⌈T / segments⌉ (the last may be shorter). Let begin be the
    first token of t's segment. Tokens i < begin and i > t have the weight
    exp(keyᵢ − decay · |t − i|), and (exp(decay) − 1) · exp(keyᵢ + decay · (t − i)) is subtracted
    from the weights of begin < i ≤ t. Unlike that kernel's, the gradients here are the derivatives
    of the computed function.

    Args:
        key: (B, T, C); −inf masks a token. Without any other key, outputs are NaN.
        value: (B, T, C).
        decay: (C,), per step; Vision-RWKV divides its parameter by T first.
        first: (C,), added to the token's own key; Vision-RWKV divides it by T, too.
        segments: number of segments of the published kernel, 32 or 16; None for the formula. With
            segments, weights can be negative and mostly cancel for decays above about 0.1.
        backend: one of :data:`BACKENDS`; default: the fastest that supports the call.

    Returns:
        (B, T, C) in the dtype of ``key``; sums are computed in float32 or higher.

    Raises:
        TypeError: an argument that is not of the annotated type.
        ValueError: incompatible shapes, dtypes or devices, ``segments`` below 1, or an unknown
            ``backend``.
        NotImplementedError: the given ``backend`` does not support this call; it says why.
    """
    _check(key, value, decay, first, segments)
    # Compute sums in float32 under autocast, too.
    with without_autocast(key.device):
        exact = torch.promote_types(key.dtype, torch.float32)
        inputs = (key.to(exact), value.to(exact), decay.to(exact), first.to(exact), segments)
        if backend is None and not isinstance(key.shape[1], int):
            # The exported graph must not contain loops that depend on the number of tokens.
            backend = "reference"
        chosen = backend_of_scan(backend, BACKENDS, *inputs)
        if key.numel() == 0:
            return ((key + decay + first) * value).to(key.dtype)  # its gradients are zeros
        out: Tensor = chosen.attend(*inputs)
        return out.to(key.dtype)


def _check(key: Tensor, value: Tensor, decay: Tensor, first: Tensor, segments: int | None) -> None:
    require_like("key", key, {"value": (value, key.shape)}, exact=("value",))
    shape = (key.shape[-1],)
    for name, tensor in (("decay", decay), ("first", first)):
        if tensor.shape != shape or not tensor.is_floating_point() or tensor.device != key.device:
            raise ValueError(
                f"{name} must be {shape}, floating-point on {key.device}, got "
                f"{tuple(tensor.shape)}, {tensor.dtype} on {tensor.device}"
            )
    if segments is not None and segments < 1:
        raise ValueError(f"segments must be None or an integer of 1 or more, got {segments!r}")
