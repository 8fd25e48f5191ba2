"""Inference form of the stages of neighborhood attention, see :mod:`ops.inference`."""

from __future__ import annotations

from backbones.neighborhood import TokenStage
from ops.inference.forms import stands_for
from ops.replay.module import recorded_form

__all__: list[str] = []

stands_for(TokenStage)(recorded_form(TokenStage))
