"""Root mean square norm that also accepts mixed precision (https://arxiv.org/abs/1910.07467)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["RMSNorm"]


class RMSNorm(nn.RMSNorm):
    """torch's RMS norm, also of inputs whose dtype is not the weights', as under autocast.

    Like layer norm, it then computes in the wider dtype and returns the input's: (..., dim) →
    (..., dim). torch's function would warn and leave its fused implementation. Arguments are those
    of :class:`torch.nn.RMSNorm`.
    """

    def forward(self, x: Tensor) -> Tensor:
        if self.weight is None or self.weight.dtype == x.dtype:
            return super().forward(x)
        wide = torch.promote_types(x.dtype, self.weight.dtype)
        weight = self.weight.to(wide)
        return F.rms_norm(x.to(wide), self.normalized_shape, weight, self.eps).to(x.dtype)
