"""Cascaded attention within small maps on the CPU in one pass, for inference.

The kernel computes everything between two projections. It is for maps so
small that torch's call overhead per head exceeds the compute time. All but the projections is
computed in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ops.cpu.call.binding import kernel
from ops.cpu.call.c_arguments import Call, sizes_of
from ops.cpu.call.dispatch import require_dtype
from ops.cpu.call.tensors import bias_of
from ops.cpu.depthwise.conv import taps_first
from ops.cpu.gemm.linear import no_products, pack_weight
from ops.cpu.threads import threads_for

_TOKENS = 32  # per thread


class PackedCascadedAttention:
    """Heads in sequence, each on its channels plus the previous head's output, then ReLU.

    A head computes ``softmax(q·kᵀ / √qk_dim + table)·v`` over all positions of a map. Channels
    beyond those of the heads pass through, apart from the ReLU.

    Args:
        projections: one 1×1 convolution with bias per head, from ``head_dim`` channels to a query
            and a key of ``qk_dim`` and a value of ``head_dim``.
        qk_dim: channels of query and key.
        convs: depthwise convolutions of the queries, one per head, with odd square windows, same
            padding and bias; none by default.
        norm: a norm over a head's channels and all positions together, before the projection.
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
        self._projection = weight, torch.stack([bias_of(layer) for layer in projections])
        self._norm: tuple[Tensor | None, Tensor | None] = (None, None)
        if norm is not None:
            self._norm = norm.weight.detach().float(), norm.bias.detach().float()
        self._convs: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None)
        if convs:
            sides = torch.tensor([conv.kernel_size[0] for conv in convs])
            taps = torch.cat([taps_first(conv.weight).flatten() for conv in convs])
            self._convs = sides, taps, torch.stack([bias_of(conv) for conv in convs])
        self._parameters = (*self._norm, *self._projection, *self._convs)

    def __call__(self, x: Tensor, table: Tensor | None = None) -> Tensor:
        """(N, H, W, dim) → (N, H, W, dim).

        Args:
            x: in the dtype of the weights; copied unless contiguous.
            table: (heads, HW, HW) float32, added to the logits; axes are heads, keys, queries.
        """
        out: Tensor = cascaded_attention(x, *self._parameters, table, self._qk_dim, self._eps)
        return out


@kernel("cascaded_attention", "cascaded_attention_forward", refuses=no_products)
def cascaded_attention(
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
) -> Call:
    """See :class:`PackedCascadedAttention`, which packs the parameters."""
    affine = {"norm_weight": norm_weight, "norm_bias": norm_bias}
    convs = {"taps": taps, "taps_bias": taps_bias}
    require_dtype(torch.float32, bias=bias, table=table, **affine, **convs)
    heads, head_dim = bias.shape[0], bias.shape[1] - 2 * qk_dim
    if x.ndim != 4 or x.shape[3] < heads * head_dim or x.dtype != weight.dtype:
        raise ValueError(
            f"x must be (N, H, W, dim) of {weight.dtype} with at least {heads} × {head_dim} "
            f"channels, got {tuple(x.shape)} of {x.dtype}"
        )
    tokens = x.shape[1] * x.shape[2]
    if table is not None and table.shape != (heads, tokens, tokens):
        raise ValueError(f"table must be {(heads, tokens, tokens)}, got {tuple(table.shape)}")
    out = torch.empty_like(x, memory_format=torch.contiguous_format)

    def arguments() -> Any:
        threads = threads_for(len(x) * tokens, _TOKENS)
        own = sizes_of(x, "images height width dim")
        return {**own, "heads": heads, "head_dim": head_dim, "threads": threads}

    return Call(out, arguments)
