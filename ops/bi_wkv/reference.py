"""Reference implementation of bi-WKV over all pairs of tokens, in O(T²) time and memory."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["attend"]


def attend(
    key: Tensor, value: Tensor, decay: Tensor, first: Tensor, segments: int | None
) -> Tensor:
    """See :func:`ops.bi_wkv.bi_wkv`; all tensors have the same dtype."""
    size = key.shape[1]
    i = torch.arange(size, device=key.device)
    t = i[:, None]
    distance = (t - i).abs()
    if segments is None:
        begin, steps = t, distance - 1
    else:
        length = (size + segments - 1) // segments
        begin = t // length * length
        steps = torch.where((begin <= i) & (i < t), distance - 1, distance)
    exponent = torch.where(i[:, None] == t[..., None], first, -decay * steps[..., None])
    exponent = key[:, None] + exponent  # (B, t, i, C)
    greatest = exponent.amax(2, keepdim=True)
    if segments is None:
        weight = (exponent - greatest).exp()
    else:
        inside = ((begin < i) & (i <= t))[..., None]
        extra = key[:, None] + decay * (t - i + 1)[..., None]
        extra = extra.masked_fill(~inside, -torch.inf)
        greatest = torch.maximum(greatest, extra.amax(2, keepdim=True))
        weight = (exponent - greatest).exp() + torch.expm1(-decay) * (extra - greatest).exp()
    return (weight * value[:, None]).sum(2) / weight.sum(2)
