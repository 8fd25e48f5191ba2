"""The picture of ``predict``: each image with its Grad-CAM overlay and classes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from backbones.cli.predictions import Prediction
from backbones.common.figures import drawable, new_figure, save_figure, short

__all__ = ["draw_predictions"]

_HEAT, _STRENGTH = "inferno", 0.6


def draw_predictions(path: Path, predictions: Sequence[Prediction], names: Sequence[str]) -> None:
    """Draw each image next to a copy with its heat map, with the top predictions below.

    Args:
        path: the PNG.
        predictions: with ``image`` and ``heat``.
        names: of the classes, by number.
    """
    from matplotlib import colormaps

    columns = min(4, len(predictions))
    rows = -(-len(predictions) // columns)
    width, height = 3.1 * columns + 0.2, 2.25 * rows + 0.15
    figure = new_figure(width, height)
    figure.subplots_adjust(
        left=0.1 / width,
        right=1 - 0.1 / width,
        bottom=0.5 / height,
        top=1 - 0.32 / height,
        wspace=0.06,
        hspace=0.5,
    )
    axes = np.atleast_1d(figure.subplots(rows, columns)).ravel()
    for axis in axes:
        axis.set_axis_off()
    for axis, prediction in zip(axes, predictions, strict=False):
        heat = prediction.heat[..., None]
        colors = colormaps[_HEAT](heat[..., 0])[..., :3]
        shown = prediction.image * (1 - _STRENGTH * heat) + colors * _STRENGTH * heat
        gap = np.ones((len(heat), max(1, len(heat) // 40), 3))
        axis.imshow(np.concatenate((prediction.image, gap, shown), axis=1))
        axis.set_title(_short_path(prediction.path), fontsize=9, loc="left", pad=3, color="#56606e")
        lines = [
            f"{short(names[number])}  {100 * confidence:.0f} %"
            for number, confidence in prediction.ranked()[:2]
        ]
        for i, line in enumerate(lines):
            axis.text(
                0,
                -0.03 - 0.13 * i,
                line,
                transform=axis.transAxes,
                va="top",
                color="#222b38",
                fontsize=10 if not i else 8.5,
                fontweight="normal" if i else "bold",
            )
    save_figure(figure, path)


def _short_path(path: Path) -> str:
    name = path.name
    return drawable(name if len(name) <= 30 else f"{name[:14]}…{name[-15:]}")
