"""Inference forms of InceptionNeXt's blocks, see :mod:`ops.inference`."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from backbones import inception_next
from ops.inference.forms import stands_for
from ops.inference.mlp import FastConvMlp

__all__ = ["InceptionNeXtBlock"]


@stands_for(inception_next.Block)
class InceptionNeXtBlock(inception_next.Block):
    """The MLP adds the shortcut."""

    needs: ClassVar = {"mlp": FastConvMlp}

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.token_mixer(x), residual=x)
