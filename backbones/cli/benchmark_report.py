"""Present the reports of ``benchmark``: rows of the page Speed, and of the terminal."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

DTYPES = ("float32", "bfloat16", "int8")
# What a reader would use without this library, by column: titles, and the contenders of each.
PLAIN = {
    "eager": ("eager", "channels_last"),
    "compile": ("compile",),  # and every other name that begins so
    "ONNX Runtime": ("onnxruntime",),
    "OpenVINO": ("openvino",),
}
_OURS = {
    "float32": ("fused",),
    "bfloat16": ("fused+bfloat16",),
    "int8": ("int8", "int8_calibrated"),
}
_TOOLKITS = ("nncf", "static", "dynamic", "x86", "int8")


class Cell(NamedTuple):
    """The fastest of some contenders: its name and its time.

    Without a time, ``failed`` holds the reason why none could run, or None if none was measured.
    """

    name: str = ""
    milliseconds: float | None = None
    failed: str | None = None


def contenders_of(row: dict[str, Any], names: Iterable[str]) -> Cell:
    """The fastest of ``names`` in a row."""
    found = {name: row["contenders"][name] for name in names if name in row["contenders"]}
    timed = {n: f["milliseconds"] for n, f in found.items() if f.get("milliseconds") is not None}
    if timed:
        name = min(timed, key=timed.__getitem__)
        return Cell(name, timed[name])
    return next((Cell(n, None, f.get("skipped", "no time")) for n, f in found.items()), Cell())


def _rival_dtype(name: str) -> str | None:
    """The dtype that a contender computes in; None for ours.

    NATTEN 0.17 as pip compiles it is no rival: it is compiled without optimisation.
    """
    ours = {name for names in _OURS.values() for name in names}
    if name in ours or name.startswith(("fused", "natten_")):
        return None
    if any(word in name.split("_") for word in _TOOLKITS):
        return "int8"
    return "bfloat16" if name.endswith(("bf16", "bfloat16")) else "float32"


def rivals(row: dict[str, Any], dtype: str) -> dict[str, float]:
    """Our speedup over each other contender in ``dtype``; {} if unknown."""
    ours = contenders_of(row, _OURS[dtype])
    if ours.milliseconds is None:
        return {}
    over = row["contenders"][ours.name].get("speedup_over", {})
    return {
        name: over.get(name, figures["milliseconds"] / ours.milliseconds)
        for name, figures in row["contenders"].items()
        if _rival_dtype(name) == dtype and figures.get("milliseconds") is not None
    }


def speed(row: dict[str, Any]) -> dict[str, Cell]:
    """The times of a row on the page Speed: a :class:`Cell` for each of PLAIN and DTYPES."""
    compiled = [n for n in row["contenders"] if n.startswith("compile") and "bfloat16" not in n]
    names_of = {**PLAIN, "compile": (*PLAIN["compile"], *compiled), **_OURS}
    return {title: contenders_of(row, names) for title, names in names_of.items()}


def speed_lines(report: dict[str, Any]) -> list[str]:
    """The rows of a report as the page Speed shows them."""
    titles = [*PLAIN, *(f"ours, {dtype}" for dtype in DTYPES)]
    lines = ["| Model | size | batch | threads | " + " | ".join(titles) + " | ours over the rest |"]
    lines.append("|---|" + "---:|" * (len(titles) + 4))
    for row in report["results"]:
        if row["direction"] != "forward":
            continue
        cells = speed(row)
        shown = [_shown(cells[name]) for name in (*PLAIN, *DTYPES)]
        over = []
        for dtype in DTYPES:
            if known := rivals(row, dtype):
                name = min(known, key=known.__getitem__)
                over.append(f"{dtype} {known[name]:.2f}× {name}")
        place = " | ".join(str(row[key]) for key in ("model", "size", "batch", "threads"))
        lines.append(f"| {place} | {' | '.join(shown)} | {', '.join(over) or '–'} |")
    return lines


def _shown(cell: Cell) -> str:
    if cell.milliseconds is not None:
        return f"{cell.milliseconds:.2f} ms"
    return "–" if cell.failed is None else "failed"


def describe(figures: dict[str, Any]) -> str:
    """The figures of a contender in one line."""
    if "skipped" in figures:
        return f"left out: {figures['skipped']}"
    over = "  ".join(f"{v:5.2f}× {k}" for k, v in figures["speedup_over"].items())
    return f"{figures['milliseconds']:9.2f} ms  {figures['gflops']:7.1f} GFLOP/s  {over}"
