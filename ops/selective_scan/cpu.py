"""The selective scan on the CPU by compiled kernels (:mod:`ops.cpu.selective.selective_scan`).

https://arxiv.org/abs/2312.00752. Differentiable and deterministic. Maps of float32 and bfloat16 are
read as they are, those of float16 converted. To save memory, the backward pass recomputes the
states within a chunk from the one before it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ops.cpu.call.differentiable import differentiable
from ops.cpu.selective.selective_scan import (
    map_scan,
    map_scan_backward,
    sequence_scan,
    sequence_scan_backward,
)
from ops.selective_scan.reference import Inputs

__all__ = ["cross", "scan", "unavailable"]


def unavailable(u: Tensor, A: Tensor) -> str | None:
    """``None`` if the kernels support the call, else the reason; the first may compile them."""
    dtype = torch.float32 if u.dtype == torch.float16 else u.dtype
    return sequence_scan.unavailable(u.device, dtype)


def scan(inputs: Inputs) -> Tensor:
    """See :func:`ops.selective_scan.selective_scan`.

    Results do not depend on the number of threads, ``torch.get_num_threads()``.
    """
    u, delta, A, B, C, D, delta_bias, delta_softplus = inputs
    dtype, (u, delta, B, C) = u.dtype, _of_one_dtype(u, delta, B, C)
    parameters = (t if t is None else t.float() for t in (D, delta_bias))
    out: Tensor = _sequence_scan(u, delta, A.float(), B, C, *parameters, delta_softplus)
    return out.to(dtype)


def cross(
    x: Tensor,
    projected: Tensor,
    delta_weight: Tensor,
    A: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> Tensor:
    """See :func:`ops.selective_scan.cross_selective_scan`; copies ``delta_weight`` unless its
    transpose is dense."""
    dtype, (x, projected) = x.dtype, _of_one_dtype(x, projected)
    parameters = (t if t is None else t.float() for t in (D, delta_bias))
    weight = delta_weight.float().mT
    out: Tensor = _map_scan(x, projected, weight, A.float(), *parameters, delta_softplus)
    return out.to(dtype)


def _of_one_dtype(*tensors: Tensor) -> list[Tensor]:
    """Maps in the one dtype that they have, or in float32."""
    dtypes = {t.dtype for t in tensors}
    one = len(dtypes) == 1 and torch.float16 not in dtypes
    return list(tensors) if one else [t.float() for t in tensors]


def _gradients(backward: Callable[..., Any], apart: Sequence[int]) -> Callable[..., list[Tensor]]:
    """Those of a kernel; the ones at ``apart`` are summed from parts."""
    return lambda *call: [g.sum(0) if i in apart else g for i, g in enumerate(backward(*call))]


_sequence_scan = differentiable(sequence_scan, _gradients(sequence_scan_backward, range(2, 7)))
_map_scan = differentiable(map_scan, _gradients(map_scan_backward, range(1, 6)))
