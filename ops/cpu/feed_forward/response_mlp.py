"""Feed-forwards with squeeze-and-excitation before and a response norm inside, in one pass.

The kernel (``response_mlp.h``) avoids many small operators on vectors, whose call overhead exceeds
their work, and multiplies channel scales into the map or the weight, whichever is smaller.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ops.cpu.binding import kernel
from ops.cpu.call import Call
from ops.cpu.gemm.linear import no_products, pack_weight
from ops.cpu.tensors import bias_of
from ops.cpu.threads import MACS, threads_for

__all__ = ["PackedResponseMlp", "response_mlp"]

# The order of the operator's weights.
_WEIGHTS = (
    *("squeeze", "squeeze_bias", "excite", "excite_bias"),
    *("weight1", "bias1", "response", "weight2", "bias2"),
)


class PackedResponseMlp:
    """``fc2(norm(gelu(fc1(x * gates(x))))) + shortcut``.

    The gates, one per image and channel, are ``sigmoid(excite(relu(squeeze(mean(x)))))`` with the
    mean over the map. The norm is ``h * (1 + response * share)``, where ``share`` is the root of
    the sum of a channel's squares over the map, divided by the mean of these roots plus ``eps``.

    Args:
        squeeze, excite: from ``dim`` to fewer channels and back, linear layers or 1×1 convolutions.
        fc1, fc2: from ``dim`` to ``hidden`` and back; in float32 or bfloat16.
        response: ``hidden`` numbers, of any shape.
        eps: of the norm.

    Raises:
        RuntimeError: the kernel is not available here.
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
            *(t for layer in (squeeze, excite) for t in (_inputs_first(layer), bias_of(layer))),
            *(pack_weight(fc1.weight), bias_of(fc1), response.detach().float().flatten()),
            *(pack_weight(fc2.weight), bias_of(fc2)),
        ]

    def __call__(self, x: Tensor, shortcut: Tensor) -> Tensor:
        """(B, H, W, dim) → (B, H, W, dim).

        Args:
            x: in the dtype of the weights; copied unless contiguous.
            shortcut: (B, H, W, dim).

        Raises:
            ValueError: wrong dtype or shape.
        """
        out: Tensor = response_mlp(x, shortcut, self._weights, self._eps)
        return out


def _inputs_first(layer: nn.Linear | nn.Conv2d) -> Tensor:
    """(in_features, out_features), contiguous, float32."""
    return layer.weight.detach().flatten(1).float().t().contiguous()


@kernel("response_mlp", "response_mlp_forward", refuses=no_products)
def response_mlp(x: Tensor, shortcut: Tensor, weights: Sequence[Tensor], eps: float) -> Call:
    """See :class:`PackedResponseMlp`, which packs the weights."""
    dim, dtype = len(weights[3]), weights[4].dtype
    if x.ndim != 4 or x.shape[3] != dim or x.dtype != dtype:
        raise ValueError(f"x must be (B, H, W, {dim}), {dtype}, got {tuple(x.shape)}, {x.dtype}")
    if shortcut.shape != x.shape or shortcut.dtype != dtype:
        raise ValueError(
            f"shortcut must be {tuple(x.shape)}, {dtype}, got {tuple(shortcut.shape)}, "
            f"{shortcut.dtype}"
        )

    def arguments() -> dict[str, Any]:
        squeezed, hidden = len(weights[1]), len(weights[6])
        return {
            **{"images": len(x), "pixels": x.shape[1] * x.shape[2]},
            **{"dim": dim, "squeezed": squeezed, "hidden": hidden},
            "threads": threads_for(2 * x.numel() * hidden, MACS),
            "other": shortcut.contiguous(),
            **dict(zip(_WEIGHTS, weights, strict=True)),
        }

    return Call(x.new_empty(x.shape), arguments)
