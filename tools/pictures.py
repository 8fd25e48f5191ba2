"""The pictures of the pages, from the same measurements as the tables."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
import speeds
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from backbones.common.figures import GRID, INK, new_figure, save_figure, style_axis
from backbones.common.files import write_atomically

Report = dict[str, Any]

# Whom the picture of README compares with: a column of the page Speed, and its colour.
_RIVALS = {
    "eager": "#3b3f46",
    "compile": "#d9822b",
    "ONNX Runtime": "#8e4ec6",
    "OpenVINO": "#1b998b",
}


def draw_all(docs: Path) -> None:
    """Draw those of the README, of learning and of neighborhood attention."""

    def read(name: str) -> Report:
        report: Report = json.loads((docs / name).read_text(encoding="utf-8"))
        return report

    found = {m["name"]: speeds.usual(docs, m["key"]) for m in speeds.cpus(docs)["machines"]}
    write_atomically(docs / "assets" / "speed.png", partial(draw_speed, found))
    draw_learning(read("learning.json"), docs / "learning.png")
    for path in docs.glob("performance/**/neighborhood_attention.json"):
        report = read(str(path.relative_to(docs)))
        write_atomically(path.with_suffix(".png"), partial(draw_neighborhood, report))


def draw_speed(found: Mapping[str, Sequence[speeds.Speeds]], file: IO[bytes]) -> None:
    """A row for each CPU and contender: a mark for each model, and a bar at the median."""
    rows = [
        (cpu, rival, values)
        for cpu, models in found.items()
        for rival in _RIVALS
        if (values := [each.ratios[rival] for each in models if rival in each.ratios])
    ]
    figure = Figure(figsize=(8.6, 0.9 + 0.32 * len(rows)), layout="constrained")
    axis = figure.subplots()
    for place, (_, rival, values) in enumerate(rows):
        colour = _RIVALS[rival]
        axis.plot(values, [place] * len(values), "o", color=colour, ms=5, alpha=0.35, mew=0)
        middle = statistics.median(values)
        axis.plot([middle] * 2, [place - 0.3, place + 0.3], color=colour, lw=3)
        beside = {"textcoords": "offset points", "va": "center", "fontsize": 8, "color": colour}
        text = f"{middle:.2f}×"
        axis.annotate(text, (max(values), place), (7, 0), **beside)
    names = [cpu for cpu, _, _ in rows]
    for place, name in enumerate(names[1:], 1):
        if name != names[place - 1]:
            axis.axhline(place - 0.5, color="#dfe3e8", lw=1)
    axis.axvline(1, color="#c0392b", lw=1.4, zorder=0)
    axis.set(xscale="log", ylim=(len(rows) - 0.4, -0.6))
    axis.set_xticks([0.8, 1, 1.5, 2, 3, 5, 8, 12], minor=False)
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, place: f"{value:g}×"))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.tick_params(axis="both", which="both", length=0, labelsize=8.5)
    labels = [f"{cpu}: {rival} ({len(values)})" for cpu, rival, values in rows]
    axis.set_yticks(range(len(rows)), labels)
    axis.grid(axis="x", color="#eef0f3")
    axis.set_axisbelow(True)
    axis.spines[:].set_visible(False)
    text = "times as long as our fused model (1×): one image, one thread, float32; bars: medians"
    axis.set_xlabel(text, fontsize=8.5, color="#56606e")
    figure.savefig(file, format="png", dpi=160)


def draw_neighborhood(report: Report, file: IO[bytes], baseline: str = "tiled") -> None:
    """Speedups over the tiled backend, with a panel for each dtype, batch and direction."""
    panels: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in report["results"]:
        panels.setdefault((row["dtype"], row["batch"], row["backward"]), []).append(row)
    figure = Figure(figsize=(12, 3.2 * max(1, len(panels))), layout="constrained")
    axes = figure.subplots(max(1, len(panels)), 1, squeeze=False)[:, 0]
    timed = (
        name
        for row in report["results"]
        for name, result in row["contenders"].items()
        if "speedup_over_tiled" in result and name != baseline
    )
    names = list(dict.fromkeys(timed))
    for axis, ((dtype, batch, backward), rows) in zip(axes, panels.items(), strict=False):
        for i, name in enumerate(names):
            speedups = [row["contenders"][name].get("speedup_over_tiled", math.nan) for row in rows]
            offset = (i - (len(names) - 1) / 2) / (len(names) + 1)
            spots = [place + offset for place in range(len(rows))]
            # Upwards from 1 if faster than tiled, downwards if slower.
            heights = [speedup - 1 for speedup in speedups]
            axis.bar(spots, heights, 1 / (len(names) + 1), bottom=1, label=name)
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, place: f"{value:g}×"))
        axis.grid(axis="y", color="0.9")
        axis.set_axisbelow(True)
        axis.axhline(1, color="black", linewidth=0.8)
        # The map, and in a second line the rest.
        labels = [row["setting"].replace("-", "\n", 1).replace("-", " ") for row in rows]
        axis.set_xticks(range(len(rows)), labels, fontsize=7)
        direction = "forward and backward" if backward else "forward"
        axis.set_title(f"{direction}, {dtype}, batch {batch}", fontsize=9)
        axis.set_ylabel("speed over tiled", fontsize=8)
    if names:
        entries = axes[0].get_legend_handles_labels()
        figure.legend(*entries, loc="outside upper center", ncols=len(names), fontsize=8)
    figure.savefig(file, format="png", dpi=120)


def draw_learning(report: Report, path: Path) -> None:
    """A small plot of the accuracy for each family, with the others in grey."""
    curves = {
        model: [row["val_top1"] for row in result["history"]]
        for model, result in report["results"].items()
    }
    columns = min(5, len(curves))
    rows = -(-len(curves) // columns)
    figure = new_figure(2.35 * columns + 0.5, 2.2 * rows + 0.7)
    axes = np.atleast_1d(figure.subplots(rows, columns, sharex=True, sharey=True)).ravel()
    for number, axis in enumerate(axes):
        if number >= len(curves):
            axis.set_axis_off()
            continue
        model = list(curves)[number]
        for values in curves.values():
            axis.plot(range(1, len(values) + 1), values, color=GRID, linewidth=1.2)
        values = curves[model]
        axis.plot(range(1, len(values) + 1), values, color="#1f5fbf", linewidth=2.2, marker="o")
        style_axis(axis, "validation accuracy, %" if number % columns == 0 else "")
        if number < len(curves) - columns:
            axis.set_xlabel("")
        else:  # the lowest of its column, which may not be in the last row
            axis.tick_params(labelbottom=True)
        axis.set_ylim(0, 104)
        axis.set_title(model, fontsize=11, color=INK, loc="left", fontweight="bold")
        under = {"textcoords": "offset points", "ha": "right", "fontsize": 10, "color": INK}
        axis.annotate(f"{values[-1]:.1f} %", (len(values), values[-1]), (0, -16), **under)
    figure.tight_layout()
    save_figure(figure, path)
