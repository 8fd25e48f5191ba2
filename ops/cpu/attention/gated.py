"""Softmax attention with rotations, a bias and a gate on the CPU, in one pass.

The kernel is that of :mod:`ops.cpu.attention.grouped`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ops.cpu.attention.grouped import attention_threads
from ops.cpu.attention.linear import gated_out, gated_parts, heads_unavailable
from ops.cpu.call.binding import kernel
from ops.cpu.call.c_arguments import Call

__all__ = ["gated_attention", "unavailable"]


def unavailable(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """``None`` if the kernel accepts such tensors, else the reason.

    The first call on a machine compiles the kernel, which takes a few seconds.
    """
    return heads_unavailable(head_dim) or gated_attention.unavailable(device, dtype)


@kernel("attention", "attention_forward")
def gated_attention(
    qkvo: Tensor, bias: Tensor, row_table: Tensor, column_table: Tensor, num_heads: int
) -> Call:
    """``(softmax attention of queries and keys rotated by the map + bias) * gate``.

    Args, Returns, Raises: see :func:`ops.cpu.attention.linear.rank_augmented_attention`.
    """
    out = gated_out(qkvo, bias, row_table, column_table, num_heads)
    batch, height, width, dim = bias.shape

    def arguments() -> Any:
        tokens, head_dim = height * width, dim // num_heads
        parts = gated_parts(qkvo)
        whole, projected = (tokens * dim, dim, head_dim), (4 * tokens * dim, 4 * dim, head_dim)
        return {
            **{"batch": batch, "groups": 1, "heads": num_heads, "routes": 1, "width": width},
            **{"queries": tokens, "region_keys": tokens, "dim": head_dim, "value_dim": head_dim},
            **{f"{name}_stride": projected for name in parts},
            **{"out_stride": whole, "bias_stride": whole, "scale": head_dim**-0.5},
            "threads": attention_threads(2 * bias.numel() * tokens),
            **parts,
        }

    return Call(out, arguments)
