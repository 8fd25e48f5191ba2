"""Feed-forwards on the CPU in one pass: norm, linear, depthwise convolution, linear, shortcut.

The kernel (``depthwise_mlp.h``) computes the hidden map, the widest of a network, in pieces that
stay in the cache.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ops.cpu.binding import kernel
from ops.cpu.call import Addresses, Call, problem_of
from ops.cpu.depthwise.conv import taps_first
from ops.cpu.dispatch import require_dtype
from ops.cpu.gemm.linear import no_products, pack_weight
from ops.cpu.structures import structure
from ops.cpu.tensors import bias_of, dense
from ops.cpu.threads import MACS, threads_for

__all__ = ["PackedDepthwiseMlp", "depthwise_mlp"]

# float32 hidden channels per step of the convolution (chunk) and of the second layer (span). Both
# are multiples of the packed panels' width, and the span is a multiple of the chunk.
_CHUNK = 192
_SPAN = 384
_FEWEST_ROWS = 4  # per thread, which also computes the hidden rows above and below

_PROBLEM = structure("feed_forward/depthwise_mlp.h", "depthwise_mlp::Problem")
_TENSORS = structure("feed_forward/depthwise_mlp.h", "depthwise_mlp::Tensors")


class PackedDepthwiseMlp:
    """``fc2(conv_activation(conv(activation(fc1(norm(x)))))) + residual``.

    Args:
        fc1: from ``in_features`` to ``hidden``; it and ``fc2`` may be 1×1 convolutions.
        conv: depthwise 3×3 with padding 1, of ``hidden`` channels; None for none.
        fc2: from ``hidden`` to ``out_features``. All layers are in float32 or bfloat16.
        activation, conv_activation: from :data:`ops.cpu.activations.ACTIVATIONS`.

    Raises:
        RuntimeError: the kernel is not available here.
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
        # The bias for the first span, zeros for those that accumulate.
        bias2 = torch.cat((bias_of(fc2), torch.zeros_like(bias_of(fc2))))
        self._in_features, self._dtype = weight1.shape[1], weight2.dtype
        self._weights = (pack_weight(weight1), bias_of(fc1))
        self._conv: tuple[Tensor | None, Tensor | None] = (None, None)
        if conv is not None:
            self._conv = taps_first(conv.weight).view(9, hidden), bias_of(conv)
        self._weights2 = (torch.cat(spans), bias2)
        self._activations = (activation, conv_activation)

    def shares_out(self, x: Tensor) -> bool:
        """Whether there is enough work for all threads; each needs several rows of the map."""
        rows = x.shape[0] * -(-x.shape[1] // _FEWEST_ROWS) if x.ndim == 4 else x.shape[0]
        return torch.get_num_threads() <= rows

    def __call__(
        self, x: Tensor, residual: Tensor | None = None, norm: nn.LayerNorm | None = None
    ) -> Tensor:
        """(B, H, W, in_features) → (B, H, W, out_features).

        Args:
            x: in the dtype of the weights; copied unless contiguous. Without a convolution, it may
                have any rank: (..., in_features).
            residual: (B, H, W, out_features), added to the result.
            norm: over the input's last axis, with weight and bias.

            Raises:
                ValueError: wrong dtype or shape, or a norm of another width or without weight and
                    bias.
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
        out: Tensor = depthwise_mlp(x, *layers, residual, eps, *self._activations)
        return out


def _span(hidden: int, dtype: torch.dtype) -> int:
    """Inputs of the second layer per step: all if partial sums would be rounded."""
    return _SPAN if dtype == torch.float32 else hidden


@kernel("depthwise_mlp", "depthwise_mlp_forward", refuses=no_products)
def depthwise_mlp(
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
) -> Call:
    """See :class:`PackedDepthwiseMlp`, which packs the weights."""
    out = x.new_empty(*x.shape[:-1], len(bias2) // 2)
    if residual is not None and residual.shape != out.shape:
        raise ValueError(f"residual must be {tuple(out.shape)}, got {tuple(residual.shape)}")
    affine = {"the norm's weight": norm_weight, "the norm's bias": norm_bias}
    require_dtype(x.dtype, residual=residual, **affine)

    def arguments() -> Any:
        # Without a convolution, tokens form a single column.
        in_features, hidden, out_features = x.shape[-1], len(bias1), out.shape[-1]
        pixels, span = x.numel() // in_features, _span(hidden, x.dtype)
        batch, height, width = x.shape[:3] if taps is not None else (1, pixels, 1)
        problem = problem_of(
            _PROBLEM,
            x,
            batch=batch,
            height=height,
            width=width,
            in_features=in_features,
            hidden=hidden,
            out_features=out_features,
            chunk=_CHUNK if taps is not None and x.dtype == torch.float32 else span,
            span=span,
            activation=activation,
            conv_activation=conv_activation,
            eps=eps,
            threads=threads_for(pixels * hidden * (in_features + out_features), MACS),
        )
        tensors = {
            **{"in": x.contiguous(), "norm_weight": norm_weight, "norm_bias": norm_bias},
            **{"weight1": weight1, "bias1": bias1, "taps": taps, "conv_bias": conv_bias},
            **{"weight2": weight2, "bias2": bias2, "out": out},
            "other": dense(residual),
        }
        return problem, Addresses(_TENSORS, tensors)

    return Call(out, arguments)
