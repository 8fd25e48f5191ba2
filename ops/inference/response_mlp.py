"""Feed-forwards with squeeze and excitation before them and a response norm inside, in one pass.

The kernel (``ops/native/response_mlp.cpp``) saves the many small operators on vectors, which take
longer than the work in them, and multiplies scales of channels into the smaller of map and weight.
There are no gradients.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ops import native
from ops.linear import pack_weight
from ops.linear import unsupported as linear_unsupported
from ops.native.eager import is_plain_call
from ops.native.threads import MACS, threads_for

__all__ = ["PackedResponseMlp", "unsupported"]

_KERNEL = "response_mlp"


class _Problem(ctypes.Structure):
    """``response_mlp::Problem`` of ops/native/response_mlp.h."""

    _fields_ = [
        *(
            (name, ctypes.c_int64)
            for name in ("images", "pixels", "dim", "squeezed", "hidden", "bfloat16")
        ),
        ("eps", ctypes.c_double),
        ("threads", ctypes.c_int64),
    ]


class _Tensors(ctypes.Structure):
    """``response_mlp::Tensors`` of ops/native/response_mlp.h."""

    _fields_ = [
        (name, ctypes.c_void_p)
        for name in (
            *("input", "squeeze", "squeeze_bias", "excite", "excite_bias", "weight1", "bias1"),
            *("response", "weight2", "bias2", "other", "output"),
        )
    ]


def unsupported(device: torch.device, dtype: torch.dtype) -> str | None:
    """``None`` if the kernel takes such tensors, else the reason in words.

    The first call on a machine compiles the kernel, which takes some seconds.
    """
    return linear_unsupported(device, dtype, with_bfloat16=True) or native.unavailable_reason(
        _KERNEL
    )


class PackedResponseMlp:
    """``fc2(norm(gelu(fc1(x * gates(x))))) + shortcut``.

    The gates, one for each image and channel, are ``sigmoid(excite(relu(squeeze(mean(x)))))`` with
    the mean over the map. The norm is ``h * (1 + response * share)``; ``share`` is the root of the
    sum of a channel's squares over the map, over the mean of all channels' roots plus ``eps``.

    Args:
        squeeze, excite: from ``dim`` to fewer channels and back, linear layers or 1×1 convolutions.
        fc1, fc2: from ``dim`` to ``hidden`` and back; in float32 or bfloat16.
        response: ``hidden`` numbers, of any shape.
        eps: of the norm.

    Raises:
        RuntimeError: the kernel is not available here (:func:`unsupported` tells beforehand).
    """

    def __init__(
        self,
        squeeze: nn.Linear | nn.Conv2d,
        excite: nn.Linear | nn.Conv2d,
        fc1: nn.Linear,
        fc2: nn.Linear,
        response: Tensor,
        eps: float,
    ) -> None:
        self._eps = eps
        self._weights = [
            *(t for layer in (squeeze, excite) for t in (_inputs_first(layer), _bias(layer))),
            *(pack_weight(fc1.weight), _bias(fc1), response.detach().float().flatten()),
            *(pack_weight(fc2.weight), _bias(fc2)),
        ]

    def __call__(self, x: Tensor, shortcut: Tensor) -> Tensor:
        """(B, H, W, dim) → (B, H, W, dim).

        Args:
            x: in the dtype of the weights; contiguous, or copied.
            shortcut: (B, H, W, dim).

        Raises:
            ValueError: another dtype or shape.
        """
        run = _run if is_plain_call((x, shortcut)) else _dispatched
        return run(x, shortcut, self._weights, self._eps)


def _inputs_first(layer: nn.Linear | nn.Conv2d) -> Tensor:
    """(in_features, out_features), contiguous, float32."""
    return layer.weight.detach().flatten(1).float().t().contiguous()


def _bias(layer: nn.Linear | nn.Conv2d) -> Tensor:
    if layer.bias is None:
        return torch.zeros(len(layer.weight), device=layer.weight.device)
    return layer.bias.detach().float()


_library = torch.library.Library("vision_backbones", "FRAGMENT")
_library.define("response_mlp(Tensor x, Tensor shortcut, Tensor[] weights, float eps) -> Tensor")
_dispatched = torch.ops.vision_backbones.response_mlp.default


@torch.library.impl(_library, "response_mlp", "CPU")
def _run(x: Tensor, shortcut: Tensor, weights: Sequence[Tensor], eps: float) -> Tensor:
    out = _empty_output(x, shortcut, weights, eps)
    library, reason = native.load(_KERNEL), unsupported(x.device, x.dtype)
    if library is None or reason is not None:
        raise RuntimeError(f"the kernel of feed-forwards with a norm is not available: {reason}")
    if out.numel() == 0:
        return out
    sizes = (len(x), x.shape[1] * x.shape[2], x.shape[3], len(weights[1]), len(weights[6]))
    problem = _problem(sizes, x.dtype == torch.bfloat16, eps, torch.get_num_threads())
    x, shortcut = x.contiguous(), shortcut.contiguous()
    tensors = _Tensors(*[t.data_ptr() for t in (x, *weights, shortcut, out)])
    if library.response_mlp_forward(ctypes.byref(problem), ctypes.byref(tensors)):
        raise MemoryError("no memory for the scratch of a feed-forward")
    return out


@torch.library.register_fake("vision_backbones::response_mlp", lib=_library)
def _empty_output(x: Tensor, shortcut: Tensor, weights: Sequence[Tensor], eps: float) -> Tensor:
    dim, dtype = len(weights[3]), weights[4].dtype
    if x.ndim != 4 or x.shape[3] != dim or x.dtype != dtype:
        raise ValueError(f"x must be (B, H, W, {dim}), {dtype}, got {tuple(x.shape)}, {x.dtype}")
    if shortcut.shape != x.shape or shortcut.dtype != dtype:
        raise ValueError(
            f"shortcut must be {tuple(x.shape)}, {dtype}, got {tuple(shortcut.shape)}, "
            f"{shortcut.dtype}"
        )
    return x.new_empty(x.shape)


@functools.lru_cache(maxsize=1024)  # a network has few different ones, and filling them in is slow
def _problem(sizes: tuple[int, ...], bfloat16: bool, eps: float, threads: int) -> _Problem:
    images, pixels, dim, _, hidden = sizes
    macs = 2 * images * pixels * dim * hidden
    return _Problem(*sizes, bfloat16, eps, threads_for(macs, MACS, threads))
