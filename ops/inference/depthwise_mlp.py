"""Feed-forwards on the CPU in one pass: norm, two linear layers, what is between them, shortcut.

The kernel (``ops/native/depthwise_mlp.cpp``) makes the hidden map, the widest of a network, in
pieces that stay in the cache. It takes float32 or bfloat16; there are no gradients.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor, nn

from ops import native
from ops.depthwise import ACTIVATIONS, taps_first
from ops.linear import pack_weight
from ops.linear import unsupported as linear_unsupported
from ops.native.eager import is_plain_call, require_dtype
from ops.native.threads import MACS, threads_for

__all__ = ["PackedDepthwiseMlp", "unsupported"]

_KERNEL = "depthwise_mlp"
# Hidden channels of float32 at a time, in front of a convolution and of the second layer: multiples
# of the panels that weights are packed in, and the second of the first.
_CHUNK = 192
_SPAN = 384
_FEWEST_ROWS = 4  # of a thread, which computes the hidden rows above and below them, too


class _Problem(ctypes.Structure):
    """``depthwise_mlp::Problem`` of ops/native/depthwise_mlp.h."""

    _fields_ = [
        *(
            (name, ctypes.c_int64)
            for name in (
                *("batch", "height", "width", "in_features", "hidden", "out_features", "chunk"),
                *("span", "activation", "conv_activation"),
            )
        ),
        ("eps", ctypes.c_double),
        ("bfloat16", ctypes.c_int64),
        ("threads", ctypes.c_int64),
    ]


class _Tensors(ctypes.Structure):
    """``depthwise_mlp::Tensors`` of ops/native/depthwise_mlp.h."""

    _fields_ = [
        (name, ctypes.c_void_p)
        for name in (
            *("input", "norm_weight", "norm_bias", "weight1", "bias1", "taps", "conv_bias"),
            *("weight2", "bias2", "other", "output"),
        )
    ]


def unsupported(device: torch.device, dtype: torch.dtype) -> str | None:
    """``None`` if the kernel takes such tensors, else the reason in words.

    The first call on a machine compiles the kernel, which takes some seconds.
    """
    reason = linear_unsupported(device, dtype, with_bfloat16=True)
    return reason or native.unavailable_reason(_KERNEL)


class PackedDepthwiseMlp:
    """``fc2(conv_activation(conv(activation(fc1(norm(x)))))) + residual``.

    Args:
        fc1: from ``in_features`` to ``hidden``; it and ``fc2`` may be convolutions of 1×1.
        conv: depthwise 3×3 with padding 1, of ``hidden`` channels; None for none.
        fc2: from ``hidden`` to ``out_features``, as all of them in float32 or bfloat16.
        activation, conv_activation: one of :data:`ops.depthwise.ACTIVATIONS` each.

    Raises:
        RuntimeError: the kernel is not available here (:func:`unsupported` tells beforehand).
    """

    def __init__(
        self,
        fc1: nn.Linear | nn.Conv2d,
        conv: nn.Conv2d | None,
        fc2: nn.Linear | nn.Conv2d,
        activation: str = "none",
        conv_activation: str = "none",
    ) -> None:
        weight1, weight2 = (layer.weight.detach().flatten(1) for layer in (fc1, fc2))
        hidden = len(weight1)
        spans = [pack_weight(part) for part in weight2.split(_span(hidden, weight2.dtype), dim=1)]
        # The bias once, zeros for the spans that only add.
        bias2 = torch.cat((_bias(fc2), _zeros(fc2)))
        self._in_features, self._dtype = weight1.shape[1], weight2.dtype
        self._weights = (pack_weight(weight1), _bias(fc1))
        self._conv: tuple[Tensor | None, Tensor | None] = (None, None)
        if conv is not None:
            self._conv = taps_first(conv.weight).view(9, hidden), _bias(conv)
        self._weights2 = (torch.cat(spans), bias2)
        self._activations = (activation, conv_activation)

    def shares_out(self, x: Tensor) -> bool:
        """Whether there is enough for each thread; a thread needs some rows of the map."""
        rows = x.shape[0] * -(-x.shape[1] // _FEWEST_ROWS) if x.ndim == 4 else x.shape[0]
        return torch.get_num_threads() <= rows

    def __call__(
        self, x: Tensor, residual: Tensor | None = None, norm: nn.LayerNorm | None = None
    ) -> Tensor:
        """(B, H, W, in_features) → (B, H, W, out_features).

        Args:
            x: in the dtype of the weights, contiguous or copied; without a convolution of any rank,
                (..., in_features).
            residual: (B, H, W, out_features), added to the result.
            norm: with weight and bias, of the input's last axis.

        Raises:
            ValueError: another dtype or shape, a norm of other features or without weight and bias.
        """
        features, dtype = self._in_features, self._dtype
        if x.shape[-1] != features or x.dtype != dtype:
            raise ValueError(f"x must be {dtype} with {features} features, got {x.dtype} {x.shape}")
        if self._conv[0] is not None and x.ndim != 4:
            raise ValueError(f"x must be (B, H, W, {features}), got {tuple(x.shape)}")
        if norm is not None and (norm.bias is None or norm.weight.shape != (features,)):
            raise ValueError(f"norm must have weight and bias of {features} features, got {norm}")
        affine = (None, None) if norm is None else (norm.weight, norm.bias)
        eps = 0.0 if norm is None else norm.eps
        tensors = (x, *affine, *self._weights, *self._conv, *self._weights2, residual)
        inputs: tuple[Any, ...] = (*tensors, eps, *self._activations)
        if is_plain_call(tensors):
            return _run(*inputs)
        return torch.ops.vision_backbones.depthwise_mlp.default(*inputs)


def _bias(layer: nn.Linear | nn.Conv2d) -> Tensor:
    return _zeros(layer) if layer.bias is None else layer.bias.detach().float()


def _zeros(layer: nn.Linear | nn.Conv2d) -> Tensor:
    """One for each output."""
    return layer.weight.new_zeros(len(layer.weight), dtype=torch.float32)


def _span(hidden: int, dtype: torch.dtype) -> int:
    """Inputs of the second layer at a time: all of them where sums of a part would be rounded."""
    return _SPAN if dtype == torch.float32 else hidden


_library = torch.library.Library("vision_backbones", "FRAGMENT")
_library.define(
    "depthwise_mlp(Tensor x, Tensor? norm_weight, Tensor? norm_bias, Tensor weight1, "
    "Tensor bias1, Tensor? taps, Tensor? conv_bias, Tensor weight2, Tensor bias2, "
    "Tensor? residual, float eps, str activation, str conv_activation) -> Tensor"
)


@torch.library.impl(_library, "depthwise_mlp", "CPU")
def _run(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight1: Tensor,
    bias1: Tensor,
    taps: Tensor | None,
    conv_bias: Tensor | None,
    weight2: Tensor,
    bias2: Tensor,
    residual: Tensor | None,
    eps: float,
    activation: str,
    conv_activation: str,
) -> Tensor:
    out = x.new_empty(*x.shape[:-1], len(bias2) // 2)
    if residual is not None and residual.shape != out.shape:
        raise ValueError(f"residual must be {tuple(out.shape)}, got {tuple(residual.shape)}")
    affine = {"the norm's weight": norm_weight, "the norm's bias": norm_bias}
    require_dtype(x.dtype, residual=residual, **affine)
    library = native.load(_KERNEL)
    if library is None:
        raise RuntimeError(f"no kernel of feed-forwards: {native.unavailable_reason(_KERNEL)}")
    if out.numel() == 0:
        return out
    x = x.contiguous()
    residual = None if residual is None else residual.contiguous()
    # Without a convolution, tokens are a column.
    size = tuple(x.shape[:3]) if taps is not None else (1, x.numel() // x.shape[-1], 1)
    problem = _problem(
        (*size, x.shape[-1], len(bias1), out.shape[-1]),
        x.dtype,
        taps is not None,
        activation,
        conv_activation,
        eps,
        torch.get_num_threads(),
    )
    tensors = (
        *(x, norm_weight, norm_bias, weight1, bias1, taps, conv_bias, weight2, bias2),
        *(residual, out),
    )
    addresses = _Tensors(*(None if t is None else t.data_ptr() for t in tensors))
    if library.depthwise_mlp_forward(ctypes.byref(problem), ctypes.byref(addresses)):
        raise MemoryError("no memory for the scratch of a feed-forward")
    return out


@torch.library.register_fake("vision_backbones::depthwise_mlp", lib=_library)
def _empty_output(x: Tensor, *others: Tensor | float | str | None) -> Tensor:
    bias2 = others[7]
    assert isinstance(bias2, Tensor)
    return x.new_empty(*x.shape[:-1], len(bias2) // 2)


@functools.lru_cache(maxsize=1024)  # a network has few different ones, and filling them in is slow
def _problem(
    sizes: tuple[int, ...],
    dtype: torch.dtype,
    has_conv: bool,
    activation: str,
    conv_activation: str,
    eps: float,
    threads: int,
) -> _Problem:
    batch, height, width, in_features, hidden, out_features = sizes
    macs = batch * height * width * hidden * (in_features + out_features)
    span, bfloat16 = _span(hidden, dtype), dtype == torch.bfloat16
    return _Problem(
        *sizes,
        _CHUNK if has_conv and not bfloat16 else span,
        span,
        ACTIVATIONS.index(activation),
        ACTIVATIONS.index(conv_activation),
        eps,
        bfloat16,
        threads_for(macs, MACS, threads),
    )
