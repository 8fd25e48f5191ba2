"""Fully trained networks of this library or of timm, as teachers and for evaluation."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import timm
from torch import nn

import backbones
from backbones.common.errors import BUILDING_ERRORS, RecipeError
from backbones.common.messages import joined_lines
from backbones.core.checkpoint import read_checkpoint, require_finite


def reading_error(error: BaseException, file: object) -> str:
    """The message of a failed read of a checkpoint, without advice to load it unsafely."""
    if "weights_only" not in str(error):
        return joined_lines(error)
    return f"{file} is not a checkpoint of tensors and plain values; it was not executed"


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
    options = {"num_classes": num_classes, "in_chans": in_chans, **(arguments or {})}
    published = checkpoint is None
    if checkpoint is not None and not Path(checkpoint).is_file():
        raise RecipeError(f"{name}: there is no checkpoint {checkpoint}")
    try:
        if name.partition(".")[0] in backbones.list_models():
            network: nn.Module = backbones.create_model(name, published, **options)
            report = backbones.load_checkpoint(network, checkpoint) if checkpoint else None
            if report is not None and report.reinitialised:
                raise RecipeError(
                    f"{name}: the weights in {checkpoint} are not for {num_classes} classes: "
                    f"{', '.join(report.reinitialised)} would stay untrained"
                )
        else:
            if checkpoint is not None and not checkpoint.endswith((".npz", ".npy")):
                read_checkpoint(checkpoint)  # says what is wrong with it, which timm does not
            weights = {"pretrained": published, "checkpoint_path": checkpoint or ""}
            network = timm.create_model(name.removeprefix("timm/"), **weights, **options)
            require_finite(network, checkpoint or name)
    except (pickle.UnpicklingError, *BUILDING_ERRORS) as error:
        if isinstance(error, RecipeError):
            raise
        raise RecipeError(f"{name}: {reading_error(error, checkpoint)}") from error
    known = (getattr(network, "pretrained_cfg", None) or {}).get("num_classes", num_classes)
    if published and known != num_classes:
        raise RecipeError(
            f"{name}: the published weights have {known} classes, not {num_classes}: give a "
            "checkpoint that was trained on these"
        )
    return network
