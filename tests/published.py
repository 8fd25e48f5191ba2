"""Published models with the weights of their figures, and comparisons with the recorded maps."""

from __future__ import annotations

from collections.abc import Iterable
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


def dense_weights(figures: dict[str, Any], norms: Iterable[int] | None = None) -> dict[str, Tensor]:
    """Those of the paper's dense networks, as detectors save them.

    Args:
        norms: the stages whose output norms the file has, by the original's ``norm0``, …; default:
            all that the dense code has.
    """
    missing = figures.get("dense_missing") or figures["dense"]["rows_missing"]
    rows = [row for row in figures["state_dict"] if not row[0].startswith(tuple(missing))]
    chosen = None if norms is None else tuple(f"norm{stage}." for stage in norms)
    rows += [row for row in figures["dense_extra"] if chosen is None or row[0].startswith(chosen)]
    return {f"backbone.{name}": tensor for name, tensor in checkpoint(figures, rows).items()}


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
