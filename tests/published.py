"""Published models with the weights of their figures, and comparisons with the recorded maps."""

from __future__ import annotations

from typing import Any

from torch import Tensor

import backbones
from backbones.cli.parity import checkpoint, image, reference, summary_error


def load_published(family: str, variant: str, **arguments: Any) -> tuple[Any, dict[str, Any]]:
    """The model in eval mode with the weights of its figures, and these."""
    figures = reference(family, variant)
    model = backbones.create_model(variant, **arguments).eval()
    backbones.load_checkpoint(model, checkpoint(figures))
    return model, figures


def dense_weights(figures: dict[str, Any]) -> dict[str, Tensor]:
    """Those of the paper's dense networks, as detectors save them."""
    names = figures.get("dense_missing") or figures["dense"]["rows_missing"]
    missing = tuple(name.removesuffix("*") for name in names)
    rows = [row for row in figures["state_dict"] if not row[0].startswith(missing)]
    weights = checkpoint(figures, rows + figures["dense_extra"])
    return {f"backbone.{name}": tensor for name, tensor in weights.items()}


def load_whole(model: Any, weights: dict[str, Tensor]) -> None:
    """Load weights that fill the model and nothing else."""
    report = backbones.load_checkpoint(model, weights)
    assert not (report.missing or report.unexpected or report.resized or report.reinitialised)


def assert_maps(
    model: Any, case: dict[str, Any], tolerance: float, expected: list[Any] | None = None
) -> None:
    """The model's maps of the case's image are the expected ones; default: its ``features``."""
    maps = model.forward_intermediates(image(case["input"], case["seed"]), intermediates_only=True)
    for value, recorded in zip(maps, expected or case["features"], strict=True):
        assert summary_error(value, recorded) <= tolerance
