"""The selective scan as Triton kernels, forward and backward; deterministic.

https://arxiv.org/abs/2312.00752. Each program scans the sequence for a block of an image's
channels, whose states stay in registers. The kernels support NVIDIA GPUs with compute capability
8.0 or newer, and any device in Triton's interpreter, which is how they are tested without a GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ops.selective_scan.reference import Inputs
from ops.triton_devices import problem_of

__all__ = ["scan", "unavailable"]

_MOST_STATES = 256


def unavailable(u: Tensor, A: Tensor) -> str | None:
    """``None`` if the kernels support the call, else the reason."""
    if A.shape[1] > _MOST_STATES:
        return f"the kernels support up to {_MOST_STATES} states per channel, got {A.shape[1]}"
    return problem_of(u)


def scan(inputs: Inputs) -> Tensor:
    """See :func:`ops.selective_scan.selective_scan`."""
    # Imported on first use: registering operators takes time, and triton is optional.
    from ops.selective_scan.triton import kernels

    u, delta, A, B, C, D, delta_bias, delta_softplus = inputs
    absent = u.new_zeros(len(A), dtype=torch.float32)
    own, bias = (absent if t is None else t.float() for t in (D, delta_bias))
    return kernels.scan(u, delta, A.float(), B, C, own, bias, delta_softplus)
