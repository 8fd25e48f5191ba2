"""Per-class metrics and the confusion matrix of a classifier."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from backbones.common.figures import (
    GRID,
    INK,
    drawable,
    new_figure,
    quiet_about_glyphs,
    save_figure,
    short,
)

__all__ = ["class_report", "confusion_matrix", "draw_confusion"]

_NAMED, _NUMBERED = 40, 20  # so many classes still leave room for their names and counts


def confusion_matrix(truth: np.ndarray, answers: np.ndarray, count: int) -> np.ndarray:
    """Images by true class (rows) and prediction (columns): (N,), (N,) → (count, count)."""
    return np.bincount(truth * count + answers, minlength=count * count).reshape(count, count)


def class_report(matrix: np.ndarray, classes: Sequence[str]) -> list[dict[str, Any]]:
    """A row for each class with its metrics and the most frequent mistake.

    Args:
        matrix: (classes, classes), see :func:`confusion_matrix`.
        classes: their names.

    Returns:
        Rows with ``class``, ``images``, ``recall``, ``precision``, ``f1`` (percent; "" where it
        is 0/0), ``taken_for`` and ``taken_for_images``: the most frequent mistake.
    """
    rows = []
    for number, name in enumerate(classes):
        right, images = int(matrix[number, number]), int(matrix[number].sum())
        predicted = int(matrix[:, number].sum())
        mistakes = matrix[number].copy()
        mistakes[number] = 0
        worst = int(mistakes.argmax())
        rows.append(
            {
                "class": name,
                "images": images,
                "recall": _percent(right, images),
                "precision": _percent(right, predicted),
                "f1": _percent(2 * right, images + predicted),
                "taken_for": classes[worst] if mistakes[worst] else "",
                "taken_for_images": int(mistakes[worst]),
            }
        )
    return rows


def draw_confusion(path: Path, matrix: np.ndarray, classes: Sequence[str], title: str) -> None:
    """Draw the matrix, normalised by row, with highlighted mistakes.

    Args:
        path: the PNG.
        matrix: (classes, classes), see :func:`confusion_matrix`.
        classes: their names.
        title: above it.
    """
    count = len(classes)
    side = float(np.clip(2.6 + 0.42 * count, 5.5, 11.0))
    figure = new_figure(side + 0.9, side + 0.4)
    axis = figure.add_subplot()
    shares = 100 * matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    # Few mistakes would vanish on a linear scale.
    image = axis.imshow(np.sqrt(shares), cmap="Blues", vmin=0, vmax=10, interpolation="nearest")
    bar = figure.colorbar(image, ax=axis, fraction=0.045, pad=0.03)
    ticks = np.array([0, 1, 5, 10, 25, 50, 75, 100])
    bar.set_ticks(list(np.sqrt(ticks)), labels=[f"{tick} %" for tick in ticks])
    bar.ax.tick_params(colors=INK, labelsize=9, length=0)
    bar.outline.set_visible(False)
    axis.set_xlabel("answer", fontsize=11, color=INK)
    axis.set_ylabel("truth", fontsize=11, color=INK)
    axis.tick_params(colors=INK, labelsize=9, length=0)
    for spine in axis.spines.values():
        spine.set_color(GRID)
    if count <= _NAMED:
        names = [short(n, 18) for n in classes]
        turned = max(map(len, names)) > 3
        axis.set_xticks(range(count), names, rotation=90 if turned else 0)
        axis.set_yticks(range(count), names)
    if count <= _NUMBERED:
        for row, column in zip(*np.nonzero(matrix), strict=True):
            dark = shares[row, column] > 30
            axis.text(
                column,
                row,
                str(matrix[row, column]),
                ha="center",
                va="center",
                fontsize=9,
                color="white" if dark else INK,
            )
    axis.set_title(drawable(title), loc="left", fontsize=12, color=INK, fontweight="bold", pad=12)
    with quiet_about_glyphs():
        figure.tight_layout()
    save_figure(figure, path)


def _percent(part: int, of: int) -> float | str:
    return round(100 * part / of, 2) if of else ""
