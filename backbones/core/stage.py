"""The stages that backbones are made of, and how they are recorded after ``fuse()``.

A family whose blocks want another layout, or tables that they share, makes a stage of its own.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ops.inference.forms import stands_for
from ops.reparam import fuse_children
from ops.replay.module import Recorded, recorded_form

__all__ = ["IsotropicStage", "Stage", "TokenStage"]


class Stage(nn.Module):
    """One resolution of a backbone: downsample, blocks, norm. NCHW comes in and goes out.

    A family whose blocks want another layout, or tables that they share, overrides
    :meth:`forward` and passes them through :meth:`run_blocks`.
    """

    def __init__(
        self,
        blocks: Iterable[nn.Module],
        downsample: nn.Module | None = None,
        norm: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.downsample = downsample if downsample is not None else nn.Identity()
        self.blocks = nn.Sequential(*blocks)
        self.norm = norm if norm is not None else nn.Identity()
        self.grad_checkpointing = False
        self.fused = False

    def run_blocks(
        self, x: Tensor, *shared: Any, first: int = 0, stop: int | None = None
    ) -> Tensor:
        """The blocks ``first`` … ``stop`` − 1 in turn, each called with ``(x, *shared)``.

        They are recomputed in the backward pass where that is set. Default: all blocks.
        """
        for block in islice(self.blocks, first, stop):
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, *shared, use_reentrant=False)
            else:
                x = block(x, *shared)
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.run_blocks(self.downsample(x)))

    def fuse(self) -> Stage:
        """Fold what can be folded inside; changes the stage in place."""
        if not self.fused:
            fuse_children(self)
            self.fused = True
        return self


class TokenStage(Stage):
    """A stage whose blocks take and give (B, h, w, dim); downsample and norm work on NCHW."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x).permute(0, 2, 3, 1)
        return self.norm(self.run_blocks(x).permute(0, 3, 1, 2))


class IsotropicStage(Stage):
    """Some of the blocks of a network of one resolution, which take and give (B, h, w, dim).

    A family whose blocks want another layout, or tables that they share, overrides
    :meth:`forward`.
    """

    def forward(self, x: Tensor, first: int = 0, stop: int | None = None) -> Tensor:
        """The blocks ``first`` … ``stop`` − 1, default all: (B, dim, h, w) → the same."""
        x = self.run_blocks(x.permute(0, 2, 3, 1), first=first, stop=stop)
        return x.permute(0, 3, 1, 2)


for _kind in (Stage, TokenStage):
    stands_for(_kind)(recorded_form(_kind))


@stands_for(IsotropicStage)
class RecordedIsotropicStage(Recorded, IsotropicStage):
    """Recorded where all of its blocks run."""

    def forward(self, x: Tensor, first: int = 0, stop: int | None = None) -> Tensor:
        if first == 0 and stop in (None, len(self.blocks)):
            return super().forward(x)
        return IsotropicStage.forward(self, x, first, stop)
