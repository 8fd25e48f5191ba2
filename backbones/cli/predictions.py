"""What ``predict`` says of images, and how it is written: a table, CSV or JSON."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backbones.core.messages import one_line
from backbones.core.tables import table

__all__ = ["Prediction", "as_csv", "as_entries", "as_table"]


@dataclass
class Prediction:
    """What a model says of one image.

    Attributes:
        classes, confidences: the likeliest first.
        error: why the image could not be read; the others are empty then.
        image: (H, W, 3) in 0 … 1, as the model saw it; for the picture only, as ``heat`` is.
        heat: (H, W) in 0 … 1, see :func:`backbones.cli.cam.grad_cam`.
    """

    path: Path
    classes: list[int]
    confidences: list[float]
    error: str = ""
    image: Any = None
    heat: Any = None

    def ranked(self) -> list[tuple[int, float]]:
        """Classes and their confidences, the likeliest first."""
        return list(zip(self.classes, self.confidences, strict=True))


def as_table(predictions: Sequence[Prediction], names: Sequence[str]) -> str:
    """For people; images that could not be read are left out."""
    rows = [
        [one_line(str(p.path)) if not place else "", names[number], f"{100 * confidence:.1f} %"]
        for p in predictions
        for place, (number, confidence) in enumerate(p.ranked())
    ]
    return table(("image", "class", "confidence"), rows, left=2) if rows else ""


def as_csv(predictions: Sequence[Prediction], names: Sequence[str]) -> str:
    """A row for each class predicted, and for each image that could not be read."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("image", "place", "class", "name", "confidence", "error"))
    for p in predictions:
        if p.error:
            writer.writerow((p.path, "", "", "", "", p.error))
        for place, (number, confidence) in enumerate(p.ranked(), start=1):
            writer.writerow((p.path, place, number, names[number], f"{confidence:.6f}", ""))
    return text.getvalue()


def as_entries(predictions: Sequence[Prediction], names: Sequence[str]) -> list[dict[str, Any]]:
    """For JSON: an entry for each image."""
    entries: list[dict[str, Any]] = []
    for p in predictions:
        if p.error:
            entries.append({"image": str(p.path), "error": p.error})
            continue
        ranked = [{"class": n, "name": names[n], "confidence": round(c, 6)} for n, c in p.ranked()]
        entries.append({"image": str(p.path), "predictions": ranked})
    return entries
