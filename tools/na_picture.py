"""Plot a report of ``benchmark_na.py``."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

BASELINE = "tiled"


def draw(report: dict[str, Any], path: Path) -> None:
    """Draw speedups over the tiled backend, with a panel for each dtype, batch and direction."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    panels: dict[tuple, list[dict]] = {}
    for row in report["results"]:
        panels.setdefault((row["dtype"], row["batch"], row["backward"]), []).append(row)
    figure = Figure(figsize=(12, 3.2 * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    timed = (
        name
        for row in report["results"]
        for name, result in row["contenders"].items()
        if "speedup_over_tiled" in result and name != BASELINE
    )
    names = list(dict.fromkeys(timed))
    for axis, ((dtype, batch, backward), rows) in zip(axes, panels.items(), strict=True):
        for i, name in enumerate(names):
            speedups = [row["contenders"][name].get("speedup_over_tiled", math.nan) for row in rows]
            offset = (i - (len(names) - 1) / 2) / (len(names) + 1)
            places = [place + offset for place in range(len(rows))]
            # Upwards from 1 if faster than tiled, downwards if slower.
            heights = [speedup - 1 for speedup in speedups]
            axis.bar(places, heights, 1 / (len(names) + 1), bottom=1, label=name)
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, place: f"{value:g}×"))
        axis.grid(axis="y", color="0.9")
        axis.set_axisbelow(True)
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_xticks(range(len(rows)), [label(row["setting"]) for row in rows], fontsize=7)
        direction = "forward and backward" if backward else "forward"
        axis.set_title(f"{direction}, {dtype}, batch {batch}", fontsize=9)
        axis.set_ylabel("speed over tiled", fontsize=8)
    if names:
        entries = axes[0].get_legend_handles_labels()
        figure.legend(*entries, loc="outside upper center", ncols=len(names), fontsize=8)
    figure.savefig(path, format="png", dpi=120)


def label(setting: str) -> str:
    """The name of a setting in two lines: the map, then the rest."""
    size, *rest = setting.split("-")
    return f"{size}\n{' '.join(rest)}"
