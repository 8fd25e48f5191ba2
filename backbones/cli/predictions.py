"""Predictions of images, as a table, CSV, JSON or a picture of their Grad-CAM."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from backbones.common.figures import INK, drawable, new_figure, save_figure, short
from backbones.common.messages import one_line
from backbones.common.outputs import csv_text
from backbones.common.tables import table

CSV_HEAD = ("image", "place", "class", "name", "confidence", "error")
"""The columns of :func:`as_csv`."""
_HEAT, _STRENGTH = "inferno", 0.6


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


def draw_predictions(path: Path, predictions: Sequence[Prediction], names: Sequence[str]) -> None:
    """Draw each image next to a copy with its heat map, with the top predictions below.

    Args:
        path: of the PNG.
        predictions: with ``image`` and ``heat``.
        names: of the classes, by number.
    """
    from matplotlib import colormaps

    columns = min(4, len(predictions))
    rows = -(-len(predictions) // columns)
    width, height = 3.1 * columns + 0.2, 2.25 * rows + 0.15
    figure = new_figure(width, height)
    edges = {"left": 0.1 / width, "right": 1 - 0.1 / width}
    edges |= {"bottom": 0.5 / height, "top": 1 - 0.32 / height}
    figure.subplots_adjust(**edges, wspace=0.06, hspace=0.5)
    axes = np.atleast_1d(figure.subplots(rows, columns)).ravel()
    for axis in axes:
        axis.set_axis_off()
    for axis, prediction in zip(axes, predictions, strict=False):
        heat = prediction.heat[..., None]
        colors = colormaps[_HEAT](heat[..., 0])[..., :3]
        shown = prediction.image * (1 - _STRENGTH * heat) + colors * _STRENGTH * heat
        gap = np.ones((len(heat), max(1, len(heat) // 40), 3))
        axis.imshow(np.concatenate((prediction.image, gap, shown), axis=1))
        name = prediction.path.name
        title = drawable(name if len(name) <= 30 else f"{name[:14]}…{name[-15:]}")
        axis.set_title(title, fontsize=9, loc="left", pad=3, color="#56606e")
        for i, (number, confidence) in enumerate(prediction.ranked()[:2]):
            line = f"{short(names[number])}  {100 * confidence:.0f} %"
            font = {"fontsize": 8.5} if i else {"fontsize": 10, "fontweight": "bold"}
            place = {"transform": axis.transAxes, "va": "top"}
            axis.text(0, -0.03 - 0.13 * i, line, color=INK, **place, **font)
    save_figure(figure, path)
