"""The first layers of a network on the CPU for inference, applied to an image in NCHW.

The kernel (``ops/cpu/stem/stem.cpp``) reads the NCHW image directly and keeps the intermediate maps
in the cache. It supports float32, and bfloat16 if the CPU has vector products of bfloat16. No
gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ops.cpu.activations import ACTIVATIONS
from ops.cpu.call.binding import kernel
from ops.cpu.call.c_arguments import Call, sizes_of
from ops.cpu.call.dispatch import require_dtype
from ops.cpu.call.tensors import bias_of, empty_nhwc
from ops.cpu.gemm.linear import no_pairs, pack_weight
from ops.cpu.gemm.problem import packed_size
from ops.cpu.threads import threads_for

_PIXELS = 512  # of an image, per thread
_STRIDES = (2, 4)  # of windows in NCHW
_USUAL = (3, 2, 1)  # side, stride and padding of the window


def pack_layers(
    convs: Sequence[nn.Conv2d], dtype: torch.dtype = torch.float32
) -> tuple[list[Tensor], list[Tensor]]:
    """The packed weights of the convolutions, and their biases.

    Args:
        convs: the first has a square window; for bfloat16, all channel counts but the image's are
            even.
        dtype: the dtype of the maps.

    Returns:
        Float32 tensors; for bfloat16, each element of the weights holds a bfloat16 pair.
    """
    weights, biases = [], []
    for i, conv in enumerate(convs):
        weight = conv.weight.detach().to(dtype)
        if i:
            weight = weight.permute(0, 2, 3, 1)
        elif dtype == torch.bfloat16:
            weight = nn.functional.pad(weight, (0, weight.shape[3] % 2))  # whole pairs per row
        weight = weight.flatten(1).contiguous()
        weights.append(pack_weight(weight.view(torch.float32)))  # pairs packed like floats
        biases.append(bias_of(conv))
    return weights, biases


@kernel("stem", "stem_forward", refuses=no_pairs)
def packed_stem(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    activations: Sequence[str],
    window: Sequence[int] = _USUAL,
) -> Call:
    """Convolutions, each with an activation: 3×3 of stride 2 and padding 1. No gradients.

    Args:
        x: (B, C, H, W) float32 or bfloat16; copied unless contiguous.
        weights, biases: see :func:`pack_layers`, for the dtype of ``x``.
        activations: from :data:`ops.cpu.activations.ACTIVATIONS`, one per layer; GELU is exact.
        window: side, stride and padding of the first convolution, if they differ; the stride is 2
            or 4.

    Returns:
        (B, C', H', W'), channels-last; by default H' is ⌈H/2ⁿ⌉ for ``n`` layers.
    """
    if x.ndim != 4 or x.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(
            f"x must be (B, C, H, W) of float32 or bfloat16, got {tuple(x.shape)} of {x.dtype}"
        )
    sizes = tuple((w.numel(), b.numel()) for w, b in zip(weights, biases, strict=True))
    _check_layers(x.shape[1], sizes, tuple(activations), x.dtype == torch.bfloat16, tuple(window))
    for tensor in (*weights, *biases):
        require_dtype(torch.float32, **{"each of weights and biases": tensor})
    side, stride, padding = window
    size = [(n + 2 * padding - side) // stride + 1 for n in x.shape[2:]]
    if min(size) < 1:
        raise ValueError(
            f"an image of {tuple(x.shape[2:])} with padding {padding} is smaller than the window "
            f"of {side}×{side}"
        )
    size = [-(-n // 2 ** (len(weights) - 1)) for n in size]
    out = empty_nhwc(x, (len(x), len(biases[-1]), *size))

    def arguments() -> Any:
        layers = [
            {"weight": w, "bias": b, "channels": len(b), "activation": act}
            for w, b, act in zip(weights, biases, activations, strict=True)
        ]
        return {
            **sizes_of(x, "batch channels height width"),
            **{"side": side, "stride": stride, "padding": padding, "layers": len(weights)},
            "threads": threads_for(x.shape[2] * x.shape[3], _PIXELS),
            "chain": layers,
        }

    return Call(out, arguments)


def _check_layers(
    channels: int,
    sizes: tuple[tuple[int, int], ...],
    activations: tuple[str, ...],
    bfloat16: bool,
    window: tuple[int, ...],
) -> None:
    if len(window) != 3 or window[0] < 1 or window[1] not in _STRIDES or window[2] < 0:
        raise ValueError(
            f"window must be a side, a stride of {_STRIDES} and a padding, got {window}"
        )
    if not sizes or len(sizes) != len(activations):
        raise ValueError(
            f"expected at least one layer and one activation per layer, got {len(sizes)} layers "
            f"and {len(activations)} activations"
        )
    for act in activations:
        if act not in ACTIVATIONS:
            raise ValueError(f"activations must be of {ACTIVATIONS}, got {act!r}")
    odd = [bias for _, bias in sizes[:-1] if bias % 2]
    if bfloat16 and odd:
        raise ValueError(f"maps of bfloat16 must have even channels, got {odd[0]}")
    for i, (weight, bias) in enumerate(sizes):
        side = 3 if i else window[0]
        inputs = side * side * channels  # for bfloat16, pairs of channels or of neighbouring pixels
        if bfloat16:
            inputs = inputs // 2 if i else side * -(-side // 2) * channels
        if weight != packed_size(bias, inputs, torch.float32):
            raise ValueError(
                f"a weight must be the packed one of {channels} to {bias} channels, "
                f"got {weight} packed numbers"
            )
        channels = bias


class NCHWConv2d:
    """``activation(conv(x))`` of an image in NCHW.

    Args:
        conv: a convolution that :meth:`applies` accepts, in float32 or bfloat16.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        if not self.applies(conv):
            raise ValueError(
                "a convolution of NCHW must have square windows 2 or 4 apart, zeros around, no "
                f"groups and no dilation, got {conv}"
            )
        self._packed = pack_layers([conv], conv.weight.dtype)
        padding: Any = conv.padding
        self._window = conv.kernel_size[0], conv.stride[0], padding[0]

    def __call__(self, x: Tensor, activation: str) -> Tensor:
        """(B, C, H, W) → (B, C', H', W'), channels-last; see :func:`packed_stem`."""
        out: Tensor = packed_stem(x, *self._packed, [activation], window=self._window)
        return out

    @staticmethod
    def applies(conv: nn.Conv2d) -> bool:
        """Whether the window is square, the stride 2 or 4, and any padding zeros."""
        if conv.groups != 1 or conv.dilation != (1, 1) or conv.padding_mode != "zeros":
            return False
        sides: Any = (conv.kernel_size, conv.stride, conv.padding)
        return conv.stride[0] in _STRIDES and all(pair[0] == pair[1] for pair in sides)
