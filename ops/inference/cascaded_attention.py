"""Attention within small maps on the CPU in one pass, all between two projections, for inference.

The kernel (``ops/native/cascaded_attention.cpp``) is for networks whose maps are so small that a
head takes torch longer to call than to compute. It takes float32 or bfloat16 and computes in
float32 what is not a projection; there are no gradients.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ops import native
from ops.depthwise import taps_first
from ops.linear import pack_weight
from ops.linear import unsupported as linear_unsupported
from ops.native.eager import Repeats, is_plain_call, require_dtype
from ops.native.threads import threads_for

__all__ = ["PackedCascadedAttention", "unsupported"]

_KERNEL = "cascaded_attention"
_TOKENS = 32  # of a thread


class _Problem(ctypes.Structure):
    """``cascaded_attention::Problem`` of ops/native/cascaded_attention.h."""

    _fields_ = [
        *(
            (name, ctypes.c_int64)
            for name in ("images", "height", "width", "dim", "heads", "head_dim", "qk_dim")
        ),
        ("eps", ctypes.c_double),
        *((name, ctypes.c_int64) for name in ("bfloat16", "threads")),
    ]


class _Tensors(ctypes.Structure):
    """``cascaded_attention::Tensors`` of ops/native/cascaded_attention.h."""

    _fields_ = [
        (name, ctypes.c_void_p)
        for name in (
            *("input", "norm_weight", "norm_bias", "weight", "bias", "kernels", "taps"),
            *("taps_bias", "table", "output"),
        )
    ]


# The same as plain bytes, which are made in less time.
_TENSORS = struct.Struct(f"={len(_Tensors._fields_)}Q")


def unsupported(device: torch.device, dtype: torch.dtype) -> str | None:
    """``None`` if the kernel takes such tensors, else the reason in words.

    The first call on a machine compiles the kernel, which takes some seconds.
    """
    reason = linear_unsupported(device, dtype, with_bfloat16=True)
    return reason or native.unavailable_reason(_KERNEL)


class PackedCascadedAttention:
    """Heads in turn, each on its share of the channels plus what the head before it gave; ReLU.

    A head computes ``softmax(q·kᵀ / √qk_dim + table)·v`` over all positions of a map. The channels
    after those of the heads pass; the ReLU is applied to them, too.

    Args:
        projections: one 1×1 convolution a head, of ``head_dim`` channels to query and key of
            ``qk_dim`` and value of ``head_dim``, with bias.
        qk_dim: channels of query and key.
        convs: depthwise convolutions of the queries, one a head, with odd square windows, padding
            that keeps the size, and bias; none by default.
        norm: of a head's channels and all positions together, before the projection.

    Raises:
        RuntimeError: the kernel is not available here (:func:`unsupported` tells beforehand).
    """

    def __init__(
        self,
        projections: Sequence[nn.Conv2d],
        qk_dim: int,
        convs: Sequence[nn.Conv2d] = (),
        norm: nn.GroupNorm | None = None,
    ) -> None:
        self._qk_dim, self._eps = qk_dim, 0.0 if norm is None else norm.eps
        weight = torch.cat([pack_weight(layer.weight.flatten(1)) for layer in projections])
        self._projection = weight, torch.stack([_bias(layer) for layer in projections])
        self._norm: tuple[Tensor | None, Tensor | None] = (None, None)
        if norm is not None:
            self._norm = norm.weight.detach().float(), norm.bias.detach().float()
        self._convs: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None)
        if convs:
            sides = torch.tensor([conv.kernel_size[0] for conv in convs])
            taps = torch.cat([taps_first(conv.weight).flatten() for conv in convs])
            self._convs = sides, taps, torch.stack([_bias(conv) for conv in convs])
        self._parameters = (*self._norm, *self._projection, *self._convs)
        self._repeats = Repeats(self._prepare)

    def __call__(self, x: Tensor, table: Tensor | None = None) -> Tensor:
        """(N, H, W, dim) → (N, H, W, dim).

        Args:
            x: in the dtype of the weights; copied where it is not contiguous.
            table: (heads, HW, HW) float32, added to the logits of key and query, in this order.

        Raises:
            ValueError: another dtype, shapes that do not go together.
        """
        way = self._repeats.find((x, table))
        if way is not None:
            return way(x, table)
        run: Callable[..., Tensor] = _run if is_plain_call((x, table)) else _dispatched
        return run(x, *self._parameters, table, self._qk_dim, self._eps)

    def _prepare(
        self, x: Tensor, table: Tensor | None
    ) -> Callable[[Tensor, Tensor | None], Tensor] | None:
        problem = ctypes.byref(_plan(x, *self._projection, table, self._qk_dim, self._eps))
        forward, parameters = _library_or_raise(x).cascaded_attention_forward, self._parameters
        dense = x.is_contiguous() and (table is None or table.is_contiguous())
        if not dense or x.numel() == 0:
            return None

        def run(x: Tensor, table: Tensor | None) -> Tensor:
            out = torch.empty_like(x)
            tensors = (x, *parameters, table, out)
            addresses = _TENSORS.pack(*(0 if t is None else t.data_ptr() for t in tensors))
            if forward(problem, addresses):
                raise MemoryError("no memory for the scratch of cascaded attention")
            return out

        return run


def _bias(layer: nn.Conv2d) -> Tensor:
    assert layer.bias is not None
    return layer.bias.detach().float()


_library = torch.library.Library("vision_backbones", "FRAGMENT")
_library.define(
    "cascaded_attention(Tensor x, Tensor? norm_weight, Tensor? norm_bias, Tensor weight, "
    "Tensor bias, Tensor? kernels, Tensor? taps, Tensor? taps_bias, Tensor? table, int qk_dim, "
    "float eps) -> Tensor"
)
_dispatched = torch.ops.vision_backbones.cascaded_attention.default


@torch.library.impl(_library, "cascaded_attention", "CPU")
def _run(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    kernels: Tensor | None,
    taps: Tensor | None,
    taps_bias: Tensor | None,
    table: Tensor | None,
    qk_dim: int,
    eps: float,
) -> Tensor:
    problem, library = _plan(x, weight, bias, table, qk_dim, eps), _library_or_raise(x)
    x = x.contiguous()
    out = torch.empty_like(x)
    if out.numel() == 0:
        return out
    table = None if table is None else table.contiguous()
    tensors = (
        *(x, norm_weight, norm_bias, weight, bias, kernels, taps, taps_bias, table),
        out,
    )
    addresses = _Tensors(*(None if t is None else t.data_ptr() for t in tensors))
    if library.cascaded_attention_forward(ctypes.byref(problem), ctypes.byref(addresses)):
        raise MemoryError("no memory for the scratch of cascaded attention")
    return out


@torch.library.register_fake("vision_backbones::cascaded_attention", lib=_library)
def _empty_output(x: Tensor, *others: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _library_or_raise(x: Tensor) -> ctypes.CDLL:
    library, reason = native.load(_KERNEL), unsupported(x.device, x.dtype)
    if library is None or reason is not None:
        raise RuntimeError(f"the kernel of cascaded attention is not available: {reason}")
    return library


def _plan(
    x: Tensor, weight: Tensor, bias: Tensor, table: Tensor | None, qk_dim: int, eps: float
) -> _Problem:
    require_dtype(torch.float32, table=table)
    return _problem(
        x.shape,
        (x.dtype, weight.dtype),
        bias.shape,
        qk_dim,
        None if table is None else table.shape,
        eps,
        torch.get_num_threads(),
    )


@functools.lru_cache(maxsize=1024)  # a network has few different ones, and filling them in is slow
def _problem(
    shape: tuple[int, ...],
    dtypes: tuple[torch.dtype, torch.dtype],
    bias: tuple[int, int],
    qk_dim: int,
    table: tuple[int, ...] | None,
    eps: float,
    threads: int,
) -> _Problem:
    heads, head_dim = bias[0], bias[1] - 2 * qk_dim
    if len(shape) != 4 or shape[3] < heads * head_dim or dtypes[0] != dtypes[1]:
        raise ValueError(
            f"x must be (N, H, W, dim) of {dtypes[1]} with at least {heads} × {head_dim} channels, "
            f"got {tuple(shape)} of {dtypes[0]}"
        )
    tokens = shape[1] * shape[2]
    if table is not None and table != (heads, tokens, tokens):
        raise ValueError(f"table must be {(heads, tokens, tokens)}, got {tuple(table)}")
    return _Problem(
        *shape,
        *(heads, head_dim, qk_dim),
        eps,
        dtypes[0] == torch.bfloat16,
        threads_for(shape[0] * tokens, _TOKENS, threads),
    )
