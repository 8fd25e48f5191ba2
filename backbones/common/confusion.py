"""Confusion matrices of classifiers: figures for each class, and a plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from backbones.common.figures import GRID, INK, drawable, new_figure, save_figure, short

# With more classes than the first, cells carry no figures; with more than the second, a chart of
# the accuracy by class, without names, replaces the matrix.
_FIGURES, _NAMES = 14, 40
_LISTED = 16
# In inches: side of a matrix, and the space for names to its left and below it.
_SIDE, _LEFT, _BELOW = 5.2, 1.35, 1.25
# Blue and orange are distinguishable with any colour vision deficiency.
_RIGHT, _WRONG, _FOUND, _BAR = "Blues", "Oranges", "#5b93c7", "#d9822b"
_MUTED = "#56606e"


def confusion_matrix(truth: np.ndarray, answers: np.ndarray, count: int) -> np.ndarray:
    """Images by true class (rows) and prediction (columns): (N,), (N,) → (count, count)."""
    return np.bincount(truth * count + answers, minlength=count * count).reshape(count, count)


def confusions(matrix: np.ndarray, classes: Sequence[str]) -> list[tuple[str, str, int]]:
    """Confusions as (true class, predicted class, count), most frequent first."""
    ones, others = np.nonzero(matrix * ~np.eye(len(matrix), dtype=bool))
    order = np.argsort(-matrix[ones, others], kind="stable")
    return [(classes[ones[i]], classes[others[i]], int(matrix[ones[i], others[i]])) for i in order]


def class_report(matrix: np.ndarray, classes: Sequence[str]) -> list[dict[str, Any]]:
    """A row for each class: metrics in percent ("" where it is 0/0), the most frequent mistake."""
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


def _percent(part: int, of: int) -> float | str:
    return round(100 * part / of, 2) if of else ""


def draw_confusions(
    path: Path, title: str, classes: Sequence[str], matrices: Mapping[str, np.ndarray]
) -> None:
    """Draw confusion matrices side by side, each under its heading and accuracy.

    Where they are large, the most frequent confusions stand below.
    """
    count = len(classes)
    bars = 4.1 if count > _FIGURES else 0.0
    panel = _SIDE + _LEFT
    # Long names are set vertically and need more space.
    below = _BELOW if count <= _NAMES and max(map(len, classes)) > 2 else 0.7
    width, height = len(matrices) * panel + 0.3, 0.95 + _SIDE + below + bars
    figure = new_figure(width, height)
    place: dict[str, Any] = {"x": 0.15 / width, "y": 1 - 0.12 / height, "va": "top"}
    figure.text(s=drawable(title), fontsize=13, color=INK, fontweight="bold", **place)

    def add(left: float, bottom: float, wide: float, high: float) -> Any:
        return figure.add_axes((left / width, bottom / height, wide / width, high / height))

    for number, (name, matrix) in enumerate(matrices.items()):
        left = number * panel + _LEFT
        axis = add(left, bars + below, _SIDE, _SIDE)
        accuracy = 100 * np.trace(matrix) / matrix.sum()
        axis.set_title(f"{name}: {accuracy:.1f} %", fontsize=12, color=INK, loc="left")
        (_draw_cells if count <= _NAMES else _draw_by_class)(axis, matrix, classes)
        axis.tick_params(colors=INK, length=0)
        for spine in axis.spines.values():
            spine.set_edgecolor(GRID)
        if bars:
            _draw_bars(add(left + 1.0, 0.2, _SIDE - 1.0, bars - 0.55), confusions(matrix, classes))
    save_figure(figure, path)


def _draw_cells(axis: Any, matrix: np.ndarray, classes: Sequence[str]) -> None:
    from matplotlib import colormaps

    count = len(classes)
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    colors = np.ones((count, count, 3))
    right = np.eye(count, dtype=bool)
    for where, name in ((right, _RIGHT), (~right, _WRONG)):
        # An offset and a square root keep cells with few images visible.
        shown = colormaps[name](0.15 + 0.75 * np.sqrt(shares))[..., :3]
        colors = np.where((where & (matrix > 0))[..., None], shown, colors)
    axis.imshow(colors, interpolation="nearest")
    axis.set_xlabel("taken for", fontsize=10.5, color=INK)
    axis.set_ylabel("class", fontsize=10.5, color=INK)
    names = [short(name) for name in classes]
    size = 9 if count <= _FIGURES else 6.5
    turned = max(map(len, names)) > 2
    axis.set_xticks(range(count), names, fontsize=size, rotation=90 if turned else 0)
    axis.set_yticks(range(count), names, fontsize=size)
    if count <= _FIGURES:
        for row, column in zip(*np.nonzero(matrix), strict=True):
            dark = shares[row, column] > 0.3
            text = {"color": "white" if dark else INK, "fontsize": 9}
            axis.text(column, row, str(matrix[row, column]), ha="center", va="center", **text)


def _draw_by_class(axis: Any, matrix: np.ndarray, classes: Sequence[str]) -> None:
    """Draw the accuracy by class, if there are too many classes for a matrix."""
    sizes = matrix.sum(axis=1)
    seen = np.flatnonzero(sizes)
    found = np.sort(100 * np.diag(matrix)[seen] / sizes[seen])
    axis.stairs(found, np.arange(len(found) + 1), fill=True, color=_FOUND)
    accuracy = 100 * np.trace(matrix) / matrix.sum()
    axis.axhline(accuracy, color=INK, linewidth=1, linestyle=(0, (4, 3)))
    axis.set_xlim(0, len(found))
    axis.set_ylim(0, 100)
    axis.set_xlabel("classes, the worst first", fontsize=10.5, color=INK)
    axis.set_ylabel("found of a class, %", fontsize=10.5, color=INK)
    axis.grid(color=GRID)
    axis.set_axisbelow(True)


def _draw_bars(axis: Any, found: Sequence[tuple[str, str, int]]) -> None:
    """Draw the most frequent confusions."""
    axis.set_title("most frequent confusions", fontsize=10.5, color=_MUTED, loc="left", pad=6)
    axis.spines[:].set_visible(False)
    axis.set_xticks([])
    axis.tick_params(colors=INK, length=0, labelsize=8)
    if not found:
        axis.set_yticks([])
        axis.text(0, 0.9, "none", transform=axis.transAxes, color=INK, fontsize=10, va="top")
        return
    found = found[:_LISTED]
    names = [f"{short(truth)} → {short(answer)}" for truth, answer, _ in found]
    counts = [count for _, _, count in found]
    axis.barh(range(len(found)), counts, color=_BAR, height=0.72)
    axis.set_yticks(range(len(found)), names)
    axis.set_ylim(_LISTED - 0.4, -0.6)
    axis.set_xlim(0, max(counts) * 1.12)
    for place, count in enumerate(counts):
        axis.text(count + max(counts) * 0.015, place, str(count), va="center", fontsize=8)
