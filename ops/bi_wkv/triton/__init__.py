"""Bi-WKV as Triton kernels, forward and backward; deterministic.

https://arxiv.org/abs/2403.02308. Each program scans the sequence for a block of an image's
channels, like the C++ kernel. Exponents are relative to the running maximum, to avoid overflow.
The kernels support NVIDIA GPUs with compute capability 8.0 or newer, and any device in Triton's
interpreter, which is how they are tested without a GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ops.triton_devices import problem_of

__all__ = ["attend", "unavailable"]


def unavailable(
    key: Tensor, value: Tensor, decay: Tensor, first: Tensor, segments: int | None
) -> str | None:
    """``None`` if the kernels support the call, else the reason."""
    return problem_of(key, torch.float32)


def attend(
    key: Tensor, value: Tensor, decay: Tensor, first: Tensor, segments: int | None
) -> Tensor:
    """See :func:`ops.bi_wkv.bi_wkv`; all tensors are float32."""
    # Imported on first use: registering operators takes time, and triton is optional.
    from ops.bi_wkv.triton.kernels import scan

    return scan(key, value, decay, first, segments or 0)
