"""Bi-WKV, the two-way scan of Vision-RWKV, by its formula or as the published kernel computes it.

https://arxiv.org/abs/2403.02308. Each backend is a file with two functions, ``supports``, which
gives ``None`` or in words why it cannot do a call, and ``attend``, which is differentiable.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from ops.autocast import without_autocast
from ops.bi_wkv import chunked, cpu, reference, triton

__all__ = ["BACKENDS", "bi_wkv"]

BACKENDS: dict[str, ModuleType] = {
    "reference": reference,
    "chunked": chunked,
    "cpu": cpu,
    "triton": triton,
}


def bi_wkv(
    key: Tensor,
    value: Tensor,
    decay: Tensor,
    first: Tensor,
    segments: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """A mean of all values in each channel, weighted by keys and by distance along the sequence.

    For token t, token i weighs exp(keyᵢ − decay · (|t − i| − 1)), and t itself exp(first + keyₜ).
    A negative decay favours what is far away. O(T) but for ``backend="reference"``.

    The CUDA kernel that the published networks were trained with computes something else: tokens
    are cut into ``segments`` of ⌈T / segments⌉ (the last may be shorter). Where begin is the first
    token of t's segment, those with i < begin or i > t weigh exp(keyᵢ − decay · |t − i|), and from
    the weights of begin < i ≤ t it subtracts (exp(decay) − 1) · exp(keyᵢ + decay · (t − i)). The
    gradients here are the derivatives of what is computed, which those of that kernel are not.

    Args:
        key: (B, T, C).
        value: (B, T, C).
        decay: (C,), a step; Vision-RWKV divides its parameter by T first.
        first: (C,), what is added to the token's own key; it divides this one, too.
        segments: of the published kernel, 32 or 16; None is the formula. With segments weights
            can be negative, and a decay above about 0.1 leaves little of their sum.
        backend: one of :data:`BACKENDS`; default the fastest that can do the call.

    Returns:
        (B, T, C) in the dtype of ``key``; sums are of float32 at least.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit each other, segments below 1, an
            unknown ``backend``.
        NotImplementedError: the ``backend`` asked for cannot do this call; the message says why.
    """
    _check(key, value, decay, first, segments)
    # Sums are precise, under autocast too.
    with without_autocast(key.device):
        exact = torch.promote_types(key.dtype, torch.float32)
        inputs = (key.to(exact), value.to(exact), decay.to(exact), first.to(exact), segments)
        chosen = _best(inputs) if backend is None else _forced(backend, inputs)
        if key.numel() == 0:
            chosen = reference
        out: Tensor = chosen.attend(*inputs)
        return out.to(key.dtype)


Inputs = tuple[Tensor, Tensor, Tensor, Tensor, int | None]


def _check(key: Tensor, value: Tensor, decay: Tensor, first: Tensor, segments: int | None) -> None:
    if key.ndim != 3 or value.shape != key.shape:
        raise ValueError(
            f"key and value must both be (B, T, C), got {tuple(key.shape)} and {tuple(value.shape)}"
        )
    if not decay.shape == first.shape == key.shape[-1:]:
        raise ValueError(
            f"decay and first must be (C,) = ({key.shape[-1]},), got {tuple(decay.shape)} and "
            f"{tuple(first.shape)}"
        )
    tensors = {"key": key, "value": value, "decay": decay, "first": first}
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be of floating point, got {tensor.dtype}")
        if tensor.device != key.device:
            raise ValueError(f"{name} is on {tensor.device}, key on {key.device}")
    if value.dtype != key.dtype:
        raise ValueError(f"value must be of key's dtype, {key.dtype}, got {value.dtype}")
    if segments is not None and (type(segments) is not int or segments < 1):
        raise ValueError(f"segments must be None or an integer of 1 or more, got {segments!r}")


def _best(inputs: Inputs) -> ModuleType:
    """The first of the ladder that can do the call."""
    if not isinstance(inputs[0].shape[1], int):
        # An exported graph holds for every number of tokens only if no loop depends on it.
        return reference
    if not torch.compiler.is_exporting():
        if inputs[0].device.type == "cuda" and triton.supports(*inputs) is None:
            return triton
        if cpu.supports(*inputs) is None:
            return cpu
    return chunked


def _forced(backend: str, inputs: Inputs) -> ModuleType:
    """The backend of this name, if it can do the call."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)} or None, got {backend!r}")
    reason = BACKENDS[backend].supports(*inputs)
    if reason is not None:
        raise NotImplementedError(f"backend {backend!r} cannot do this call: {reason}")
    return BACKENDS[backend]
