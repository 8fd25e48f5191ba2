"""Feed-forwards on the CPU in one pass: norm, linear, depthwise convolution, linear, shortcut.

The kernel (``depthwise_mlp.cpp``) computes the hidden map, the widest of a network, in pieces that
stay in the cache. It also computes inverted bottlenecks, and the part of one before its
squeeze-and-excitation.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ops.cpu.activations import require_activation
from ops.cpu.call.binding import kernel
from ops.cpu.call.c_arguments import Call, sizes_of
from ops.cpu.call.dispatch import require_dtype
from ops.cpu.call.tensors import bias_of, dense
from ops.cpu.depthwise.conv import taps_first
from ops.cpu.gemm.linear import no_products, pack_weight
from ops.cpu.threads import MACS, threads_for

# The most float32 hidden channels per step of the second layer (span), which has two steps of the
# convolution (chunks). Chunks are multiples of the packed panels' width.
_SPAN = 384
# Per thread and row of the convolution's padding: each thread also computes the hidden rows above
# and below its own.
_FEWEST_ROWS = 4
_KERNELS, _STRIDES = (3, 5, 7), (1, 2)
_LINE = 16  # float32 in a cache line, and the largest vector


class PackedDepthwiseMlp:
    """``fc2(conv_activation(conv(activation(fc1(norm(x)))))) + residual``.

    Args:
        fc1: from ``in_features`` to ``hidden``; it and ``fc2`` may be 1×1 convolutions. None if
            ``conv`` comes first, with at least 16 channels and no norm before it.
        conv: depthwise, of ``hidden`` channels, see :meth:`applies`; None for none.
        fc2: from ``hidden`` to ``out_features``. All layers are in float32 or bfloat16.
        activation, conv_activation: from :data:`ops.cpu.activations.ACTIVATIONS`.
    """

    def __init__(
        self,
        fc1: nn.Linear | nn.Conv2d | None,
        conv: nn.Conv2d | None,
        fc2: nn.Linear | nn.Conv2d,
        activation: str = "none",
        conv_activation: str = "none",
    ) -> None:
        weight2 = fc2.weight.detach().flatten(1)
        hidden = weight2.shape[1]
        spans = [pack_weight(part) for part in weight2.split(_span(hidden, weight2.dtype), dim=1)]
        # The bias for the first span, zeros for those that accumulate.
        bias2 = torch.cat((bias_of(fc2), torch.zeros_like(bias_of(fc2))))
        self._in_features, self._dtype = hidden, weight2.dtype
        self._weights: tuple[Tensor | None, Tensor | None] = (None, None)
        if fc1 is not None:
            weight1 = fc1.weight.detach().flatten(1)
            self._in_features = weight1.shape[1]
            self._weights = (pack_weight(weight1), bias_of(fc1))
        self._conv: tuple[Tensor | None, Tensor | None] = (None, None)
        self._margin, self._stride = 0, 1
        if conv is not None:
            padding = (0, _padded(hidden) - hidden)
            self._conv = F.pad(taps_first(conv.weight), padding), F.pad(bias_of(conv), padding)
            self._margin, self._stride = conv.kernel_size[0] // 2, conv.stride[0]
        self._weights2 = (torch.cat(spans), bias2)
        self._activations = (activation, conv_activation)

    @staticmethod
    def applies(conv: nn.Conv2d, is_first: bool = False) -> bool:
        """Whether ``conv`` is depthwise with a window of 3×3, 5×5 or 7×7 and strides of 1 or 2.

        The padding must be half of the window, with zeros. As the first layer, it needs at least
        16 channels.
        """
        side, stride = conv.kernel_size[0], conv.stride[0]
        square = (conv.kernel_size, conv.stride) == ((side, side), (stride, stride))
        padded = conv.padding == (side // 2, side // 2) and conv.padding_mode == "zeros"
        depthwise = conv.groups == conv.in_channels == conv.out_channels
        window = side in _KERNELS and stride in _STRIDES and conv.dilation == (1, 1)
        enough = not is_first or conv.in_channels >= _LINE
        return square and padded and depthwise and window and enough

    def pays(self, x: Tensor) -> bool:
        """Whether there is enough work for all threads; each needs several rows of the map."""
        if x.ndim != 4:
            return torch.get_num_threads() <= x.shape[0]
        fewest = _FEWEST_ROWS * max(1, self._margin)
        return torch.get_num_threads() <= x.shape[0] * -(-x.shape[1] // fewest)

    def __call__(
        self, x: Tensor, residual: Tensor | None = None, norm: nn.LayerNorm | None = None
    ) -> Tensor:
        """(B, H, W, in_features) → (B, ⌈H / stride⌉, ⌈W / stride⌉, out_features).

        Args:
            x: in the dtype of the weights; copied unless contiguous. Without a convolution, it may
                have any rank: (..., in_features).
            residual: added to the result.
            norm: over the input's last axis, with weight and bias.
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
        layers = (*affine, *self._weights, *self._conv, *self._weights2)
        out: Tensor = depthwise_mlp(x, *layers, residual, self._stride, eps, *self._activations)
        return out


class PackedExpansion:
    """``conv_activation(conv(activation(fc1(x))))`` and the means of its channels.

    Args:
        fc1: from ``in_features`` to ``hidden``, 16 or more; it may be a 1×1 convolution.
        conv: depthwise, of ``hidden`` channels, see :meth:`PackedDepthwiseMlp.applies`. Both layers
            are in float32 or bfloat16.
        activation, conv_activation: from :data:`ops.cpu.activations.ACTIVATIONS`.
    """

    def __init__(
        self,
        fc1: nn.Linear | nn.Conv2d,
        conv: nn.Conv2d,
        activation: str = "none",
        conv_activation: str = "none",
    ) -> None:
        if conv.in_channels < _LINE:
            raise ValueError(f"conv must have {_LINE} channels or more, got {conv.in_channels}")
        padding = (0, _padded(conv.in_channels) - conv.in_channels)
        weight1 = fc1.weight.detach().flatten(1)
        self._in_features = weight1.shape[1]
        first = pack_weight(weight1), bias_of(fc1)
        taps = F.pad(taps_first(conv.weight), padding), F.pad(bias_of(conv), padding)
        self._weights = (*first, *taps, conv.stride[0])
        self._activations = activation, conv_activation

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, H, W, in_features) → (B, ⌈H / stride⌉, ⌈W / stride⌉, hidden) and (B, hidden)."""
        if x.shape[-1] != self._in_features:
            raise ValueError(f"x must have {self._in_features} features, got {x.shape[-1]}")
        out, means = depthwise_expansion(x, *self._weights, *self._activations)
        return out, means


def _padded(hidden: int) -> int:
    """Channels between taps: an odd number of cache lines, so that they use all sets of a cache."""
    return (-(-hidden // _LINE) | 1) * _LINE


def _span(hidden: int, dtype: torch.dtype) -> int:
    """Inputs of the second layer per step: all if partial sums would be rounded."""
    return _step(hidden, _SPAN, 4 * _LINE) if dtype == torch.float32 else hidden


def _step(hidden: int, most: int, unit: int) -> int:
    """Channels per step, a multiple of ``unit``: the last step has a vector or more, if any has."""
    return next((n for n in range(most, 0, -unit) if not 0 < hidden % n < _LINE), most)


@kernel("depthwise_mlp", "depthwise_mlp_forward", returns=2, refuses=no_products)
def depthwise_expansion(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    taps: Tensor,
    conv_bias: Tensor,
    stride: int,
    activation: str,
    conv_activation: str,
) -> Call:
    """See :class:`PackedExpansion`, which packs the weights."""
    require_activation(activation)
    require_activation(conv_activation)
    require_dtype(weight1.dtype, x=x)
    require_dtype(torch.float32, bias1=bias1, taps=taps, conv_bias=conv_bias)
    if x.ndim != 4 or 0 in x.shape[1:]:
        raise ValueError(f"x must be (B, H, W, in_features) and not empty, got {tuple(x.shape)}")
    hidden = len(bias1)
    out = x.new_empty(len(x), *(-(-n // stride) for n in x.shape[1:3]), hidden)
    means = x.new_empty(len(x), hidden)

    def arguments() -> Any:
        macs = hidden * x.numel() + out.numel() * len(taps) ** 2
        return {
            **sizes_of(x, "batch height width in_features"),
            **{"hidden": hidden, "out_features": hidden, "span": hidden},
            "chunk": _step(hidden, _SPAN // 2, 2 * _LINE),
            **{
                "kernel": len(taps),
                "taps_stride": taps.shape[2],
                "threads": threads_for(macs, MACS),
            },
            **{"eps": 0.0, "norm_weight": None, "norm_bias": None, "weight2": None},
            **{"bias2": None, "other": None, "out": out, "means": means},
        }

    return Call((out, means), arguments)


@kernel("depthwise_mlp", "depthwise_mlp_forward", refuses=no_products)
def depthwise_mlp(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight1: Tensor | None,
    bias1: Tensor | None,
    taps: Tensor | None,
    conv_bias: Tensor | None,
    weight2: Tensor,
    bias2: Tensor,
    residual: Tensor | None,
    stride: int,
    eps: float,
    activation: str,
    conv_activation: str,
) -> Call:
    """See :class:`PackedDepthwiseMlp`, which packs the weights."""
    size = x.shape[:-1] if taps is None else (len(x), *(-(-n // stride) for n in x.shape[1:3]))
    out = x.new_empty(*size, len(bias2) // 2)
    if residual is not None and residual.shape != out.shape:
        raise ValueError(f"residual must be {tuple(out.shape)}, got {tuple(residual.shape)}")
    if bias1 is None and (taps is None or x.shape[-1] < _LINE or norm_weight is not None):
        raise ValueError(
            f"without a first layer, x must have {_LINE} features or more, got {x.shape[-1]}, a "
            "convolution must follow, and no norm precede it"
        )
    affine = {"the norm's weight": norm_weight, "the norm's bias": norm_bias}
    require_dtype(x.dtype, residual=residual, weight1=weight1, weight2=weight2, **affine)
    require_dtype(torch.float32, bias1=bias1, taps=taps, conv_bias=conv_bias, bias2=bias2)
    require_activation(activation)
    require_activation(conv_activation)

    def arguments() -> Any:
        # Without a convolution, tokens form a single column.
        in_features, out_features = x.shape[-1], out.shape[-1]
        hidden = in_features if bias1 is None else len(bias1)
        pixels, span = x.numel() // in_features, _span(hidden, x.dtype)
        batch, height, width = x.shape[:3] if taps is not None else (1, pixels, 1)
        return {
            **{"batch": batch, "height": height, "width": width, "hidden": hidden, "span": span},
            **{"in_features": in_features, "out_features": out_features},
            "kernel": 1 if taps is None else len(taps),
            "taps_stride": 0 if taps is None else taps.shape[2],
            "chunk": span // 2 if taps is not None and x.dtype == torch.float32 else span,
            "threads": threads_for(pixels * hidden * (in_features + out_features), MACS),
            "other": dense(residual),
            "means": None,
        }

    return Call(out, arguments)
