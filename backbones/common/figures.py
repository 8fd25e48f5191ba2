"""Figures: their colours and axes, names that can be drawn, and PNGs written atomically."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backbones.common.files import write_atomically
from backbones.common.messages import one_line

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, GRID = "#222b38", "#e4e8ee"


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of the given size in inches."""
    # Figure instead of pyplot: no global state, no display.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=110, facecolor="white")


def style_axis(axis: Any, label: str, below: str = "epoch") -> None:
    """An axis over whole numbers, with ``label`` at its side."""
    from matplotlib.ticker import MaxNLocator

    axis.set_xlabel(below, fontsize=11, color=INK)
    axis.set_ylabel(label, fontsize=11, color=INK)
    axis.grid(color=GRID)
    axis.set_axisbelow(True)
    axis.tick_params(colors=INK, labelsize=10, length=0)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axis.spines[side].set_color(GRID)


def short(name: str) -> str:
    """:func:`drawable`, without its middle if it is long."""
    return drawable(name if len(name) <= 16 else f"{name[:9]}…{name[-6:]}")


def drawable(name: str) -> str:
    """A name for a figure: one line, without math mode and surrogates."""
    return one_line(name).encode(errors="backslashreplace").decode().replace("$", r"\$")


def save_figure(figure: Figure, path: Path) -> None:
    """Write a PNG atomically."""
    data = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # the font
        figure.savefig(data, format="png")
    write_atomically(path, lambda file: file.write(data.getvalue()))
