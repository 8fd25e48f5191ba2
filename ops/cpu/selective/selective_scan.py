"""Selective scan on the CPU, see :mod:`ops.selective_scan`.

Of sequences (``sequences.h``) and of a map in four orders (``map.h``), forward (``forward.h``) and
backward (``backward.h``). Steps, decays, states and sums are in float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ops.cpu.binding import kernel
from ops.cpu.call import Call
from ops.cpu.dispatch import require_dtype
from ops.cpu.tensors import dense_channels
from ops.cpu.threads import VALUES, threads_for

__all__ = ["map_scan", "sequence_scan"]


@kernel("selective_scan", "selective_scan_sequences", large_results=True)
def sequence_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    softplus: bool,
) -> Call:
    """The scan; shapes as in :func:`ops.selective_scan.selective_scan`. No gradients.

    Raises:
        ValueError: A, D or delta_bias not in float32, or others in a dtype other than that of u.
    """
    require_dtype(torch.float32, A=A, D=D, delta_bias=delta_bias)
    require_dtype(u.dtype, delta=delta, B=B, C=C)

    def arguments() -> dict[str, Any]:
        groups = B.shape[1]
        return {
            **_sizes(len(u), u.shape[2], groups, A, softplus),
            **_channels(A, D, delta_bias),
            **{"u": _rows(u, groups), "delta": _rows(delta, groups)},
            **{"before": _rows(B), "after": _rows(C)},
        }

    return Call(u.new_empty(u.shape), arguments)


@kernel("selective_scan", "selective_scan_map", large_results=True)
def map_scan(
    x: Tensor,
    projected: Tensor,
    weight: Tensor,
    A: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    softplus: bool,
) -> Call:
    """The scan of a map in four orders, and its sum. No gradients.

    Shapes as in :func:`ops.selective_scan.cross_selective_scan`, but for ``weight``: (4, R, P).

    Raises:
        ValueError: parameters not in float32, or maps of different dtypes.
    """
    require_dtype(torch.float32, weight=weight, A=A, D=D, delta_bias=delta_bias)
    require_dtype(x.dtype, projected=projected)

    def arguments() -> dict[str, Any]:
        return {**_map_sizes(x, weight, A, softplus), **_channels(A, D, delta_bias)}

    return Call(x.new_empty(x.shape), arguments)


def _channels(A: Tensor, D: Tensor | None, delta_bias: Tensor | None) -> dict[str, Any]:
    named = {"decay": A, "own": D, "bias": delta_bias}
    return {name: None if t is None else t.contiguous() for name, t in named.items()}


def _rows(t: Tensor, groups: int | None = None) -> dict[str, Any]:
    """(B, G, rows, L), or (B, G · rows, L) with the number of groups; L is made dense."""
    t = dense_channels(t)
    batch, *steps, _ = t.stride()
    group, row = steps if groups is None else (t.shape[1] // groups * steps[0], steps[0])
    return {"data": t, "batch": batch, "group": group, "row": row}


def _sizes(batch: int, tokens: int, groups: int, A: Tensor, softplus: bool) -> dict[str, int]:
    return {
        **{"batch": batch, "tokens": tokens, "groups": groups, "dim": len(A) // groups},
        **{"states": A.shape[1], "softplus": softplus},
        # An exponential for every state.
        "threads": threads_for(4 * batch * tokens * A.numel(), VALUES),
    }


def _map_sizes(x: Tensor, weight: Tensor, A: Tensor, softplus: bool) -> dict[str, int]:
    batch, height, width, _ = x.shape
    return {
        **_sizes(batch, height * width, len(weight), A, softplus),
        **{"height": height, "width": width, "rank": weight.shape[1]},
    }
