"""Feed-forwards with squeeze-and-excitation before and a response norm inside, in one pass.

The kernel avoids many small operators on vectors, whose call overhead exceeds
their work, and multiplies channel scales into the map or the weight, whichever is smaller.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ops.arguments import require_shapes
from ops.cpu.call.binding import kernel
from ops.cpu.call.c_arguments import Call
from ops.cpu.call.dispatch import require_dtype
from ops.cpu.call.tensors import bias_of
from ops.cpu.gemm.linear import no_products, pack_weight
from ops.cpu.threads import MACS, threads_for

_Int8 = tuple[Tensor, Tensor, Tensor, Tensor | None]

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
        in_int8: for ``fc1`` and ``fc2``, what :func:`ops.cpu.gemm.linear.packed_linear` takes
            of a layer in int8: packed weight, its scales, bias and, or None, the range of inputs.
    """

    def __init__(
        self,
        squeeze: nn.Linear | nn.Conv2d,
        excite: nn.Linear | nn.Conv2d,
        fc1: nn.Linear,
        fc2: nn.Linear,
        response: Tensor,
        eps: float,
        in_int8: Sequence[_Int8 | None] = (None, None),
    ) -> None:
        self._eps = eps
        (weight1, bias1, *scales1), (weight2, bias2, *scales2) = (
            _packed(layer, packed) for layer, packed in zip((fc1, fc2), in_int8, strict=True)
        )
        self._weights = [
            *(t for layer in (squeeze, excite) for t in (_inputs_first(layer), bias_of(layer))),
            *(weight1, bias1, response.detach().float().flatten(), weight2, bias2),
        ]
        self._scales: list[Tensor | None] = [*scales1, *scales2]

    def __call__(self, x: Tensor, shortcut: Tensor) -> Tensor:
        """(B, H, W, dim) → (B, H, W, dim).

        Args:
            x: in the dtype of the weights, or, if both are in int8, float32 or bfloat16; copied
                unless contiguous.
            shortcut: (B, H, W, dim).
        """
        out: Tensor = response_mlp(x, shortcut, self._weights, self._eps, *self._scales)
        return out


def _packed(
    layer: nn.Linear, in_int8: _Int8 | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Packed weight, bias, and in int8 the scales of weights and the range of inputs."""
    if in_int8 is None:
        return pack_weight(layer.weight), bias_of(layer), None, None
    weight, weight_scale, bias, in_range = in_int8
    return weight, bias, weight_scale, in_range


def _inputs_first(layer: nn.Linear | nn.Conv2d) -> Tensor:
    """(in_features, out_features), contiguous, float32."""
    return layer.weight.detach().flatten(1).float().t().contiguous()


@kernel("response_mlp", "response_mlp_forward", refuses=no_products)
def response_mlp(
    x: Tensor,
    shortcut: Tensor,
    weights: Sequence[Tensor],
    eps: float,
    weight_scale1: Tensor | None = None,
    in_range1: Tensor | None = None,
    weight_scale2: Tensor | None = None,
    in_range2: Tensor | None = None,
) -> Call:
    """See :class:`PackedResponseMlp`, which packs the weights."""
    dim = len(weights[3])
    floats = [w.dtype for w in (weights[4], weights[7]) if w.dtype != torch.int8]
    dtype = floats[0] if floats else x.dtype
    axes = "images height width dim"
    require_shapes({"dim": dim}, x=(x, axes), shortcut=(shortcut, axes))
    require_dtype(dtype, x=x, shortcut=shortcut)

    named = dict(zip(_WEIGHTS, weights, strict=True))
    for name, scale in (("weight1", weight_scale1), ("weight2", weight_scale2)):
        require_dtype(x.dtype if scale is None else torch.int8, **{name: named.pop(name)})
    scales = {"weight_scale1": weight_scale1, "weight_scale2": weight_scale2}
    require_dtype(torch.float32, **named, **scales, in_range1=in_range1, in_range2=in_range2)

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
