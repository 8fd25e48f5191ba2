"""Predictions of images, as a table, CSV or JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backbones.common.messages import one_line
from backbones.common.outputs import csv_text
from backbones.common.tables import table

__all__ = ["CSV_HEAD", "Prediction", "as_csv", "as_entries", "as_table"]

CSV_HEAD = ("image", "place", "class", "name", "confidence", "error")
"""The columns of :func:`as_csv`."""


@dataclass
class Prediction:
    """A model's prediction for one image.

    Attributes:
        classes, confidences: in descending order of confidence.
        error: why the image could not be read; then the other fields are empty.
        image: (H, W, 3) in 0 … 1, the model's input; only for pictures, like ``heat``.
        heat: (H, W) in 0 … 1, see :func:`backbones.cli.cam.grad_cam`.
    """

    path: Path
    classes: list[int]
    confidences: list[float]
    error: str = ""
    image: Any = None
    heat: Any = None

    def ranked(self) -> list[tuple[int, float]]:
        """(class, confidence) pairs, the most likely first."""
        return list(zip(self.classes, self.confidences, strict=True))


def as_table(predictions: Sequence[Prediction], names: Sequence[str]) -> str:
    """A text table, without unreadable images."""
    rows = [
        [one_line(str(p.path)) if not place else "", names[number], f"{100 * confidence:.1f} %"]
        for p in predictions
        for place, (number, confidence) in enumerate(p.ranked())
    ]
    return table(("image", "class", "confidence"), rows, left=2) if rows else ""


def as_csv(predictions: Sequence[Prediction], names: Sequence[str]) -> str:
    """CSV with a row for each predicted class and for each unreadable image."""
    rows: list[tuple[Any, ...]] = []
    for p in predictions:
        if p.error:
            rows.append((p.path, "", "", "", "", p.error))
        for place, (number, confidence) in enumerate(p.ranked(), start=1):
            rows.append((p.path, place, number, names[number], f"{confidence:.6f}", ""))
    return csv_text(CSV_HEAD, rows)


def as_entries(predictions: Sequence[Prediction], names: Sequence[str]) -> list[dict[str, Any]]:
    """An entry for each image, for JSON."""
    entries: list[dict[str, Any]] = []
    for p in predictions:
        if p.error:
            entries.append({"image": str(p.path), "error": p.error})
            continue
        ranked = [{"class": n, "name": names[n], "confidence": round(c, 6)} for n, c in p.ranked()]
        entries.append({"image": str(p.path), "predictions": ranked})
    return entries
