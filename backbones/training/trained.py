"""Fully trained networks of this library or of timm, as teachers and for evaluation."""

from __future__ import annotations

from typing import Any

import timm
from torch import nn

import backbones
from backbones.common.errors import BUILDING_ERRORS, RecipeError
from backbones.common.messages import joined_lines


def load_trained(
    name: str,
    checkpoint: str | None,
    num_classes: int,
    in_chans: int = 3,
    arguments: dict[str, Any] | None = None,
) -> nn.Module:
    """Create a network of this library or of timm and load all weights, the classifier's too.

    ``timm/NAME`` is timm's own if both have a model of that name. Without ``checkpoint``, the
    weights are the published ones.
    """
    plain = name.partition(".")[0]
    is_timms = timm.is_model(plain) and plain not in backbones.list_models()
    options = {"num_classes": num_classes, "in_chans": in_chans, **(arguments or {})}
    try:
        network: nn.Module = backbones.create_model(
            f"timm/{name}" if is_timms else name, checkpoint is None, **options
        )
        report = backbones.load_checkpoint(network, checkpoint) if checkpoint else None
    except BUILDING_ERRORS as error:
        raise RecipeError(f"{name}: {joined_lines(error)}") from error
    if report is not None and report.reinitialised:
        raise RecipeError(
            f"{name}: the weights in {checkpoint} are not for {num_classes} classes: "
            f"{', '.join(report.reinitialised)} would stay untrained"
        )
    known = (getattr(network, "pretrained_cfg", None) or {}).get("num_classes", num_classes)
    if checkpoint is None and known != num_classes:
        raise RecipeError(
            f"{name}: the published weights have {known} classes, not {num_classes}: give a "
            "checkpoint that was trained on these"
        )
    return network
