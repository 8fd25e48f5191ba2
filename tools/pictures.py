"""The pictures of the pages, from the same measurements as the tables."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from backbones.common.figures import GRID, INK, new_figure, save_figure, style_axis
from backbones.common.files import write_atomically

Report = dict[str, Any]

SPEED = [f"performance/zen5/{name}.json" for name in ("models", "runtimes")]
_PLACE = {"batch": 1, "threads": 1, "dtype": "float32", "direction": "forward"}
# Contenders at the top of the README: label, colour, marker, and vertical offset, since the
# original, timm and birder often take the same time.
_OTHERS = {
    "original": ("the original", "#3b3f46", "o", 0.0),
    "natten_0_17": ("the original (NATTEN 0.17.3)", "#3b3f46", "D", 0.0),
    "timm": ("timm", "#2f6fde", "o", -0.2),
    "birder": ("birder", "#d9822b", "o", 0.2),
    "onnxruntime": ("ONNX Runtime", "#8e4ec6", "s", 0.0),
    "openvino": ("OpenVINO", "#1b998b", "s", 0.0),
}


def draw_all(docs: Path) -> None:
    """Draw those of the README, of learning and of neighborhood attention."""

    def read(name: str) -> Report:
        report: Report = json.loads((docs / name).read_text(encoding="utf-8"))
        return report

    speed = list(map(read, SPEED))
    write_atomically(docs / "assets" / "speed.png", partial(draw_speed, speed))
    draw_learning(read("learning.json"), docs / "learning.png")
    for path in docs.glob("performance/**/neighborhood_attention.json"):
        report = read(str(path.relative_to(docs)))
        write_atomically(path.with_suffix(".png"), partial(draw_neighborhood, report))


def speedups(reports: Iterable[Report]) -> dict[str, dict[str, float]]:
    """For each model, the time of each other contender relative to the fused model.

    Ratios are taken within one report, whose contenders were measured alternately.
    """
    found: dict[str, dict[str, float]] = {}
    smallest: dict[str, int] = {}
    for report in reports:
        for row in report["results"]:
            times = {
                name: figures["milliseconds"]
                for name, figures in row["contenders"].items()
                if "milliseconds" in figures
            }
            if {k: row[k] for k in _PLACE} != _PLACE or not times.keys() & _OTHERS.keys():
                continue
            if row["size"] > smallest.setdefault(row["model"], row["size"]):
                continue
            ratios = {n: t / times["fused"] for n, t in times.items() if n in _OTHERS}
            found.setdefault(row["model"], {}).update(ratios)
    return found


def draw_speed(reports: list[Report], file: IO[bytes]) -> None:
    """A line for each model and a marker for each contender: one image, one thread, float32."""
    rows = speedups(reports)
    figure = Figure(figsize=(8.6, 0.6 + 0.36 * len(rows)), layout="constrained")
    axis = figure.subplots()
    for place, ratios in enumerate(rows.values()):
        axis.plot([1, max(ratios.values())], [place, place], color="#dfe3e8", lw=5, zorder=1)
        for name, ratio in ratios.items():
            _, colour, mark, offset = _OTHERS[name]
            style = {"color": colour, "ms": 6, "mec": "white", "mew": 0.8, "zorder": 3}
            axis.plot(ratio, place + offset, mark, **style)
        slowest = max(ratios.values())
        text = f"{slowest:.0f}×" if slowest >= 10 else f"{slowest:.1f}×"
        beside = {"textcoords": "offset points", "va": "center", "fontsize": 8.5}
        axis.annotate(text, (slowest, place), (7, 0), color="#3b3f46", **beside)
    axis.axvline(1, color="#c0392b", lw=1.4, zorder=2)
    axis.set(xscale="log", ylim=(len(rows) - 0.4, -0.6))
    axis.set_xlim(0.9, 1.35 * max(max(r.values()) for r in rows.values()))
    axis.set_xticks([1, 1.5, 2, 3, 5, 10, 20, 40], minor=False)
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, place: f"{value:g}×"))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.tick_params(axis="both", which="both", length=0, labelsize=9)
    axis.set_yticks(range(len(rows)), rows)
    axis.grid(axis="x", color="#eef0f3")
    axis.set_axisbelow(True)
    axis.spines[:].set_visible(False)
    machine = reports[0]["machine"]["name"]
    text = "time relative to our fused model (1×): one image, one thread, float32"
    axis.set_xlabel(f"{text}, {machine} (Zen 5)", fontsize=8.5, color="#56606e")
    used = [name for name in _OTHERS if any(name in ratios for ratios in rows.values())]
    for name in used:
        label, colour, mark, _ = _OTHERS[name]
        axis.plot([], [], mark, color=colour, ms=7, mec="white", label=label)
    close = {"frameon": False, "handletextpad": 0.1, "columnspacing": 1.2}
    figure.legend(loc="outside upper center", ncols=len(used), fontsize=8.5, **close)
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
