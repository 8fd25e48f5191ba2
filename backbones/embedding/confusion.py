"""Draw the confusion matrices of a probe."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from backbones.common.figures import GRID, INK, drawable, new_figure, save_figure
from backbones.embedding.probe import Method, Report

__all__ = ["confusions", "draw_confusion"]

# With more classes than the first, cells carry no figures; with more than the second, a chart of
# the accuracy by class, without names, replaces the matrix.
_FIGURES, _NAMES = 14, 40
_LISTED = 16
# In inches: side of a matrix, and the space for names to its left and below it.
_SIDE, _LEFT, _BELOW = 5.2, 1.35, 1.25
# Blue and orange are distinguishable with any colour vision deficiency.
_RIGHT, _WRONG, _FOUND, _BAR = "Blues", "Oranges", "#5b93c7", "#d9822b"
_MUTED = "#56606e"


def confusions(method: Method, classes: Sequence[str]) -> list[tuple[str, str, int]]:
    """Confusions as (true class, predicted class, count), most frequent first."""
    matrix = method.confusion.copy()
    np.fill_diagonal(matrix, 0)
    ones, others = np.nonzero(matrix)
    order = np.argsort(-matrix[ones, others], kind="stable")
    return [(classes[ones[i]], classes[others[i]], int(matrix[ones[i], others[i]])) for i in order]


def draw_confusion(path: Path, report: Report, title: str) -> None:
    """Draw the confusion matrix of each method, and the most frequent confusions where it is large.

    Args:
        path: of the PNG.
        title: heading of the picture.
    """
    count = len(report.classes)
    bars = 4.1 if count > _FIGURES else 0.0
    panel = _SIDE + _LEFT
    # Long names are set vertically and need more space.
    below = _BELOW if count <= _NAMES and max(map(len, report.classes)) > 2 else 0.7
    width, height = len(report.methods) * panel + 0.3, 0.95 + _SIDE + below + bars
    figure = new_figure(width, height)
    figure.text(
        0.15 / width,
        1 - 0.12 / height,
        drawable(title),
        fontsize=13,
        color=INK,
        fontweight="bold",
        va="top",
    )

    def add(left: float, bottom: float, wide: float, high: float) -> Any:
        return figure.add_axes((left / width, bottom / height, wide / width, high / height))

    for place, method in enumerate(report.methods):
        left = place * panel + _LEFT
        axis = add(left, bars + below, _SIDE, _SIDE)
        axis.set_title(
            f"{method.name}: {100 * method.accuracy:.1f} %", fontsize=12, color=INK, loc="left"
        )
        (_matrix if count <= _NAMES else _by_class)(axis, method, report.classes)
        if bars:
            _bars(add(left + 1.0, 0.2, _SIDE - 1.0, bars - 0.55), method, report.classes)
    save_figure(figure, path)


def _matrix(axis: Any, method: Method, classes: Sequence[str]) -> None:
    from matplotlib import colormaps

    matrix, count = method.confusion, len(classes)
    sizes = matrix.sum(axis=1, keepdims=True)
    shares = matrix / np.maximum(sizes, 1)
    colors = np.ones((count, count, 3))
    right = np.eye(count, dtype=bool)
    for where, name in ((right, _RIGHT), (~right, _WRONG)):
        # An offset and a square root keep cells with few images visible.
        strength = 0.15 + 0.75 * np.sqrt(shares)
        colors = np.where(
            (where & (matrix > 0))[..., None], colormaps[name](strength)[..., :3], colors
        )
    axis.imshow(colors, interpolation="nearest")
    axis.set_xlabel("taken for", fontsize=10.5, color=INK)
    axis.set_ylabel("class", fontsize=10.5, color=INK)
    names = [_short(name) for name in classes]
    size = 9 if count <= _FIGURES else 6.5
    turned = max(map(len, names)) > 2
    axis.set_xticks(range(count), names, fontsize=size, rotation=90 if turned else 0)
    axis.set_yticks(range(count), names, fontsize=size)
    axis.tick_params(colors=INK, length=0)
    for spine in axis.spines.values():
        spine.set_edgecolor(GRID)
    if count <= _FIGURES:
        for row, column in zip(*np.nonzero(matrix), strict=True):
            dark = shares[row, column] > 0.3
            text = {"color": "white" if dark else INK, "fontsize": 9}
            axis.text(column, row, str(matrix[row, column]), ha="center", va="center", **text)


def _by_class(axis: Any, method: Method, classes: Sequence[str]) -> None:
    """Draw the accuracy by class, if there are too many classes for a matrix."""
    sizes = method.confusion.sum(axis=1)
    seen = np.flatnonzero(sizes)
    found = np.sort(100 * np.diag(method.confusion)[seen] / sizes[seen])
    edges = np.arange(len(found) + 1)
    axis.stairs(found, edges, fill=True, color=_FOUND)
    axis.axhline(100 * method.accuracy, color=INK, linewidth=1, linestyle=(0, (4, 3)))
    axis.set_xlim(0, len(found))
    axis.set_ylim(0, 100)
    axis.set_xlabel("classes, the worst first", fontsize=10.5, color=INK)
    axis.set_ylabel("found of a class, %", fontsize=10.5, color=INK)
    axis.tick_params(colors=INK, length=0)
    axis.grid(color=GRID)
    axis.set_axisbelow(True)
    for spine in axis.spines.values():
        spine.set_edgecolor(GRID)


def _bars(axis: Any, method: Method, classes: Sequence[str]) -> None:
    """Draw the most frequent confusions."""
    found = confusions(method, classes)[:_LISTED]
    axis.set_title("most frequent confusions", fontsize=10.5, color=_MUTED, loc="left", pad=6)
    for side in ("top", "right", "bottom", "left"):
        axis.spines[side].set_visible(False)
    axis.set_xticks([])
    axis.tick_params(colors=INK, length=0, labelsize=8)
    if not found:
        axis.set_yticks([])
        axis.text(0, 0.9, "none", transform=axis.transAxes, color=INK, fontsize=10, va="top")
        return
    names = [f"{_short(truth)} → {_short(answer)}" for truth, answer, _ in found]
    counts = [count for _, _, count in found]
    axis.barh(range(len(found)), counts, color=_BAR, height=0.72)
    axis.set_yticks(range(len(found)), names)
    axis.set_ylim(_LISTED - 0.4, -0.6)
    axis.set_xlim(0, max(counts) * 1.12)
    for place, count in enumerate(counts):
        axis.text(count + max(counts) * 0.015, place, str(count), va="center", fontsize=8)


def _short(name: str) -> str:
    return drawable(name if len(name) <= 16 else f"{name[:9]}…{name[-6:]}")
