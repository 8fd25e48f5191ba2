"""Two linear layers with an activation between them on the CPU for inference, in one pass.

The kernel is that of :mod:`ops.cpu.gemm.linear`. A few rows at a time go through both layers, so
hidden rows stay in the cache.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ops.cpu.call.binding import kernel
from ops.cpu.call.c_arguments import Call
from ops.cpu.call.tensors import dense
from ops.cpu.gemm.linear import no_products
from ops.cpu.gemm.problem import linear_problem, output_shape, with_rows

__all__ = ["packed_mlp"]


@kernel("gemm", "linear_forward_pair", refuses=no_products)
def packed_mlp(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    activation: str = "none",
    residual: Tensor | None = None,
    weight_scale1: Tensor | None = None,
    weight_scale2: Tensor | None = None,
    in_range1: Tensor | None = None,
    in_range2: Tensor | None = None,
) -> Call:
    """``activation(x @ weight1.T + bias1) @ weight2.T + bias2 + residual``. No gradients.

    Args:
        x: (B, ..., in_features), float32 or bfloat16. With weights in int8, hidden rows are stored
            in this dtype and quantised while they are in the cache.
        weight1, weight2: see :func:`ops.cpu.gemm.linear.packed_linear`.
        bias1: (hidden,) float32.
        bias2: (out_features,) float32.
        activation: as for :func:`ops.cpu.gemm.linear.packed_linear`.
        residual: (B, ..., out_features), in the dtype of ``x``.
        weight_scale1, weight_scale2, in_range1, in_range2: of the layers, for int8.

    Returns:
        (B, ..., out_features), contiguous.

    Raises:
        ValueError, RuntimeError: see :func:`ops.cpu.gemm.linear.packed_linear`.
    """
    added = "none" if residual is None else "add"
    if weight1.dtype != weight2.dtype:
        raise ValueError(f"weights must have one dtype, got {weight1.dtype} and {weight2.dtype}")
    first: Any = {"weight_scale": weight_scale1, "in_range": in_range1}
    second: Any = {"weight_scale": weight_scale2, "in_range": in_range2}
    hidden = output_shape(x, weight1, bias1, activation, **first)
    shape = output_shape(x, weight2, bias2, "none", residual, added, hidden, **second)
    out = x.new_empty(shape)

    def arguments() -> dict[str, Any]:
        rows, in_stride = with_rows(x)
        other, other_stride = with_rows(residual)
        before = {"weight": weight1, "bias": bias1, **first}
        after = {"weight": weight2, "bias": bias2, **second}
        before, after = ({n: dense(t) for n, t in layer.items()} for layer in (before, after))
        return {
            "first": linear_problem(x, len(bias1), activation, in_stride=in_stride),
            "before": {"in": rows, **before},
            "second": linear_problem(
                x, len(bias2), "none", added, in_features=len(bias1), other_stride=other_stride
            ),
            "after": {**after, "other": other, "out": out},
        }

    return Call(out, arguments)
