"""Kolmogorov-Arnold layers on the CPU in one pass, for inference.

The kernel (``kan.cpp``) computes the basis functions of some rows at a time and applies the linear
layer while they are in the cache.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ops.arguments import require_shapes
from ops.cpu.call.binding import kernel
from ops.cpu.call.c_arguments import Call
from ops.cpu.call.dispatch import require_dtype
from ops.cpu.gemm.linear import no_products
from ops.cpu.gemm.problem import packed_size
from ops.cpu.threads import MACS, threads_for

LARGEST_POWER = 30.0  # the largest exponent of two in a grid; half of FAR in kan.cpp


class PackedKAN(NamedTuple):
    """A layer's parameters in the kernel's layout.

    ``norm_weight`` and ``norm_bias`` (in_features,), ``powers`` (num_grids,), which are two to the
    power of grid points times ``scale``, and ``bias`` (out_features,), zeros, are float32.
    ``weight`` is packed and has num_grids · in_features inputs.
    """

    norm_weight: Tensor
    norm_bias: Tensor
    powers: Tensor
    weight: Tensor
    bias: Tensor
    eps: float
    scale: float


@kernel("kan", "kan_forward", refuses=no_products)
def kan_layer(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    powers: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    scale: float,
) -> Call:
    """Apply a packed KAN layer. No gradients.

    Args:
        x: (..., in_features), float32 or bfloat16 like the packed weight.
        norm_weight, norm_bias, powers, weight, bias, eps, scale: see :class:`PackedKAN`.

    Returns:
        (..., out_features), contiguous.
    """
    affine = {"norm_weight": norm_weight, "norm_bias": norm_bias}
    require_dtype(torch.float32, powers=powers, bias=bias, **affine)
    require_shapes(norm_weight=(norm_weight, "in_features"), x=(x, "... in_features"))
    require_dtype(weight.dtype, x=x)
    if weight.numel() != packed_size(len(bias), len(norm_weight) * len(powers), x.dtype):
        raise ValueError(
            f"weight is not packed for {len(bias)} outputs of {len(norm_weight)} inputs at "
            f"{len(powers)} points"
        )

    def arguments() -> dict[str, int]:
        return {
            **{"rows": x.shape[:-1].numel(), "in_features": len(norm_weight)},
            **{"grids": len(powers), "out_features": len(bias)},
            "threads": threads_for(x.numel() * len(powers) * len(bias), MACS),
        }

    return Call(x.new_empty(*x.shape[:-1], len(bias)), arguments)
