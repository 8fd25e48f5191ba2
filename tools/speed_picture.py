"""Draw the picture at the top of the README: speedups of fused models over other implementations.

    python tools/speed_picture.py

Reads the reports of ``tools/benchmark.py`` and plots the rows with one image, one thread, float32.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from backbones.common.arguments import nonempty_path
from backbones.common.console import Parser, guard
from backbones.common.files import write_atomically
from backbones.common.outputs import FIGURE, add_overwrite, require_writable

_DOCS = Path(__file__).resolve().parents[1] / "docs"
_REPORTS = [_DOCS / f"performance/zen5/{name}.json" for name in ("models", "runtimes")]
_OURS, _PLACE = "fused", {"batch": 1, "threads": 1, "dtype": "float32", "direction": "forward"}
# Contenders to draw: label, colour, marker, and vertical offset, since the original, timm and
# birder often take the same time.
_OTHERS = {
    "original": ("the original", "#3b3f46", "o", 0.0),
    "natten_0_17": ("the original (NATTEN 0.17.3)", "#3b3f46", "D", 0.0),
    "timm": ("timm", "#2f6fde", "o", -0.2),
    "birder": ("birder", "#d9822b", "o", 0.2),
    "onnxruntime": ("ONNX Runtime", "#8e4ec6", "s", 0.0),
    "openvino": ("OpenVINO", "#1b998b", "s", 0.0),
}


def speedups(reports: Iterable[dict[str, Any]]) -> dict[str, dict[str, float]]:
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
            ratios = {n: t / times[_OURS] for n, t in times.items() if n in _OTHERS}
            found.setdefault(row["model"], {}).update(ratios)
    return found


def draw(reports: list[dict[str, Any]], path: Path) -> None:
    """A line for each model and a marker for each contender, as PNG."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullFormatter

    rows = speedups(reports)
    figure = Figure(figsize=(8.6, 0.6 + 0.36 * len(rows)), layout="constrained")
    axis = figure.subplots()
    for place, ratios in enumerate(rows.values()):
        axis.plot([1, max(ratios.values())], [place, place], color="#dfe3e8", lw=5, zorder=1)
        for name, ratio in ratios.items():
            _, colour, mark, offset = _OTHERS[name]
            axis.plot(
                ratio, place + offset, mark, color=colour, ms=6, mec="white", mew=0.8, zorder=3
            )
        slowest = max(ratios.values())
        text = f"{slowest:.0f}×" if slowest >= 10 else f"{slowest:.1f}×"
        axis.annotate(
            text,
            (slowest, place),
            (7, 0),
            textcoords="offset points",
            va="center",
            fontsize=8.5,
            color="#3b3f46",
        )
    axis.axvline(1, color="#c0392b", lw=1.4, zorder=2)
    axis.set(xscale="log", ylim=(len(rows) - 0.4, -0.6))
    axis.set_xlim(0.9, 1.35 * max(max(r.values()) for r in rows.values()))
    ticks = [1, 1.5, 2, 3, 5, 10, 20, 40]
    axis.set_xticks(ticks, minor=False)
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, place: f"{value:g}×"))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.tick_params(axis="both", which="both", length=0, labelsize=9)
    axis.set_yticks(range(len(rows)), rows)
    axis.grid(axis="x", color="#eef0f3")
    axis.set_axisbelow(True)
    axis.spines[:].set_visible(False)
    machine = reports[0]["machine"]["name"]
    axis.set_xlabel(
        f"time relative to our fused model (1×): one image, one thread, float32, {machine} (Zen 5)",
        fontsize=8.5,
        color="#56606e",
    )
    used = [name for name in _OTHERS if any(name in ratios for ratios in rows.values())]
    for name in used:
        label, colour, mark, _ = _OTHERS[name]
        axis.plot([], [], mark, color=colour, ms=7, mec="white", label=label)
    figure.legend(
        loc="outside upper center",
        ncols=len(used),
        fontsize=8.5,
        frameon=False,
        handletextpad=0.1,
        columnspacing=1.2,
    )
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=160))


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("reports", nargs="*", type=nonempty_path, default=_REPORTS, metavar="JSON")
    parser.add_argument(
        "--out", type=nonempty_path, default=_DOCS / "assets/speed.png", metavar="PNG"
    )
    add_overwrite(parser)
    options: argparse.Namespace = parser.parse_args(arguments)
    require_writable({"--out": (options.out, FIGURE)}, options.reports, options.overwrite)
    draw([json.loads(path.read_text()) for path in options.reports], options.out)
    return 0


if __name__ == "__main__":
    sys.exit(guard(main))
