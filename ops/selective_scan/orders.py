"""VMamba's four orders of a map's pixels, as sequences, and the sum of such sequences as a map.

https://arxiv.org/abs/2401.10166
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ops.arguments import checked
from ops.selective_scan.reference import Inputs


@checked(ranks={"x": 4})
def cross_scan(x: Tensor) -> Tensor:
    """The pixels row by row, column by column, and both in reverse.

    Args:
        x: (B, H, W, C).

    Returns:
        (B, 4, C, H · W); :func:`cross_merge` is the adjoint.
    """
    by_row = x.permute(0, 3, 1, 2)
    ahead = torch.stack([by_row.flatten(2), by_row.mT.flatten(2)], 1)
    return torch.cat([ahead, ahead.flip(-1)], 1)


@checked(ranks={"y": 4})
def cross_merge(y: Tensor, height: int, width: int) -> Tensor:
    """Bring the sequences of :func:`cross_scan` back to their pixels and sum them.

    Args:
        y: (B, 4, C, height · width).

    Returns:
        (B, height, width, C).

    Raises:
        ValueError: another number of sequences or pixels.
    """
    if y.shape[1] != 4 or y.shape[3] != height * width:
        raise ValueError(
            f"y must be (B, 4, C, {height} · {width} = {height * width}), got {tuple(y.shape)}"
        )
    by_row, by_column = (y[:, :2] + y[:, 2:].flip(-1)).unbind(1)
    columns = by_column.unflatten(-1, (width, height)).mT
    return (by_row.unflatten(-1, (height, width)) + columns).permute(0, 2, 3, 1)


def scan_in_four_orders(
    scan: Callable[[Inputs], Tensor],
    x: Tensor,
    projected: Tensor,
    delta_weight: Tensor,
    A: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> Tensor:
    """:func:`ops.selective_scan.cross_selective_scan` by a backend's scan of four sequences."""
    height, width, rank, states = *x.shape[1:3], delta_weight.shape[2], A.shape[1]
    precise = torch.promote_types(x.dtype, torch.float32)
    sequences = cross_scan(x)  # (B, 4, P, L)
    of_order = cross_scan(projected).unflatten(2, (4, -1))  # (B, 4, 4, R + 2 N, L)
    own = of_order.diagonal(dim1=1, dim2=2).movedim(-1, 1)
    steps, before, after = own.split([rank, states, states], 2)
    delta = torch.matmul(delta_weight.to(precise), steps.to(precise)).flatten(1, 2)
    u = sequences.flatten(1, 2).to(precise)
    out = scan(Inputs(u, delta, A, before, after, D, delta_bias, delta_softplus))
    return cross_merge(out.unflatten(1, (4, -1)), height, width).to(x.dtype)
