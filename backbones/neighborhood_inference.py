"""Inference forms of the stages of neighborhood attention, see :mod:`ops.inference`."""

from __future__ import annotations

from torch import Tensor

from backbones.core.isotropic import IsotropicStage
from backbones.neighborhood import TokenStage
from ops.inference.forms import stands_for
from ops.replay.module import Recorded, recorded_form

__all__ = ["RecordedIsotropicStage"]

stands_for(TokenStage)(recorded_form(TokenStage))


@stands_for(IsotropicStage)
class RecordedIsotropicStage(Recorded, IsotropicStage):
    """Recorded where all of its blocks run."""

    def forward(self, x: Tensor, first: int = 0, stop: int | None = None) -> Tensor:
        if first == 0 and stop in (None, len(self.blocks)):
            return super().forward(x)
        return IsotropicStage.forward(self, x, first, stop)
