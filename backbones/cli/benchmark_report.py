"""Present the reports of ``benchmark``: rows of the page Speed, table, comparison, plot."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import IO, Any, NamedTuple

# The settings of a row.
SETTING = ("model", "size", "batch", "threads", "dtype", "direction")


def row_key(row: dict[str, Any]) -> tuple[Any, ...]:
    """The settings of a row as a key."""
    return tuple(row[part] for part in SETTING)


# -- the row of the page Speed ---------------------------------------------------------------------

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


def _elsewhere(row: dict[str, Any], dtype: str) -> list[str]:
    """The contenders of a row that are not ours and compute in ``dtype``.

    NATTEN 0.17 as pip compiles it is none: it is compiled without optimisation.
    """

    def dtype_of(name: str) -> str:
        if any(word in name.split("_") for word in _TOOLKITS):
            return "int8"
        return "bfloat16" if name.endswith(("bf16", "bfloat16")) else "float32"

    ours = {name for names in _OURS.values() for name in names}
    return [
        name
        for name in row["contenders"]
        if name not in ours
        and not name.startswith(("fused", "natten_"))
        and dtype_of(name) == dtype
    ]


def rivals(row: dict[str, Any], dtype: str) -> dict[str, float]:
    """Our speedup over each other contender in ``dtype``; {} if unknown."""
    ours = contenders_of(row, _OURS[dtype])
    if ours.milliseconds is None:
        return {}
    over = row["contenders"][ours.name].get("speedup_over", {})
    times = {name: contenders_of(row, [name]).milliseconds for name in _elsewhere(row, dtype)}
    return {
        name: over.get(name, time / ours.milliseconds)
        for name, time in times.items()
        if time is not None
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


# -- the whole report ------------------------------------------------------------------------------


def table(report: dict[str, Any]) -> str:
    """All rows in Markdown: ms, and the times of the eager model and the peers relative to it."""
    m = report["machine"]
    lines = [
        f"{m['name']} ({m['cpu_capability']}), torch {m['torch']}; medians of interleaved runs.",
        "",
        "| Model | size | batch | threads | dtype | | what | ms | p90 | images/s | of matmul | "
        "memory, MiB | times faster than |",
        "|---|---:|---:|---:|---|---|---|---:|---:|---:|---:|---:|---|",
    ]
    for row in report["results"]:
        place = "| {model} | {size} | {batch} | {threads} | {dtype} | {direction} ".format(**row)
        for name, figures in row["contenders"].items():
            if "skipped" in figures:
                lines.append(f"{place}| {name} | left out: {figures['skipped'][:80]} |||||")
                continue
            over = ", ".join(f"{k} {v:.2f}" for k, v in figures["speedup_over"].items())
            memory = "–" if figures["peak_bytes"] is None else f"{figures['peak_bytes'] >> 20}"
            lines.append(
                f"{place}| {name} | {figures['milliseconds']:.1f} | {figures['p90']:.1f} | "
                f"{figures['images_per_second']:.1f} | {100 * figures['fraction_of_matmul']:.0f} % "
                f"| {memory} | {over} |"
            )
    return "\n".join(lines) + "\n"


def _by_size(report: dict[str, Any]) -> dict[tuple[Any, ...], dict[int, float]]:
    """(model, contender, …) → size → ms, for at least two sizes."""
    series: dict[tuple[Any, ...], dict[int, float]] = {}
    for row in report["results"]:
        for name, figures in row["contenders"].items():
            if "milliseconds" in figures:
                parts = ("batch", "threads", "dtype", "direction")
                key = (row["model"], name, *(f"{part} {row[part]}" for part in parts))
                series.setdefault(key, {})[row["size"]] = figures["milliseconds"]
    return {key: sizes for key, sizes in series.items() if len(sizes) > 1}


def comparison(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """A line for each time in both reports, with the speedup of the new one."""
    before = {row_key(row): row["contenders"] for row in old["results"]}
    lines = []
    for row in new["results"]:
        key = row_key(row)
        for name, figures in row["contenders"].items():
            was = before.get(key, {}).get(name, {}).get("milliseconds")
            if was is not None and "milliseconds" in figures:
                now = figures["milliseconds"]
                place = " ".join(map(str, key))
                lines.append(f"{place} {name}: {was:.1f} → {now:.1f} ms, {was / now:.2f}×")
    return lines


def describe(figures: dict[str, Any]) -> str:
    """The figures of a contender in one line."""
    if "skipped" in figures:
        return f"left out: {figures['skipped']}"
    over = "  ".join(f"{v:5.2f}× {k}" for k, v in figures["speedup_over"].items())
    return f"{figures['milliseconds']:9.2f} ms  {figures['gflops']:7.1f} GFLOP/s  {over}"


def draw(report: dict[str, Any], file: IO[bytes]) -> None:
    """Draw speedups over eager, with a panel per setting, and curves over size."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    panels: dict[str, list[dict[str, Any]]] = {}
    for row in report["results"]:
        if all(
            "speedup_over" not in f or "eager" not in f["speedup_over"]
            for f in row["contenders"].values()
        ):
            continue  # nothing to compare with; only its curve over size is drawn
        title = "{size}², batch {batch}, {threads} thread(s), {dtype}, {direction}".format(**row)
        panels.setdefault(title, []).append(row)
    everyone = dict.fromkeys(n for rows in panels.values() for r in rows for n in r["contenders"])
    colours = {name: f"C{number}" for number, name in enumerate(everyone)}
    curves = _by_size(report)
    count = max(1, len(panels) + bool(curves))
    figure = Figure(figsize=(11, 3 * count), layout="constrained")
    axes = figure.subplots(count, 1, squeeze=False)[:, 0]
    for axis, (title, rows) in zip(axes, panels.items(), strict=False):
        names = list(dict.fromkeys(name for row in rows for name in row["contenders"]))
        names = [name for name in names if name != "eager"]
        for i, name in enumerate(names):
            speeds = [_speed(row["contenders"], name) for row in rows]
            places = [j + (i - (len(names) - 1) / 2) / (len(names) + 1) for j in range(len(rows))]
            axis.bar(places, speeds, 1 / (len(names) + 1), label=name, color=colours[name])
        axis.axhline(1, color="black", linewidth=0.8)
        turned = {"rotation": 20, "ha": "right"} if len(rows) > 8 else {}
        axis.set_xticks(range(len(rows)), [row["model"] for row in rows], fontsize=6, **turned)
        axis.set_xlim(-0.6, max(len(rows), 4) - 0.4)
        axis.set_title(title, fontsize=9)
        axis.set_ylabel("speed over eager", fontsize=8)
        axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=7)
    if curves:
        # Slowest first, in the order of the curves.
        ordered = sorted(curves.items(), key=lambda item: -item[1][max(item[1])])
        tones = colormaps["tab20"].colors  # type: ignore[attr-defined]
        for i, (key, sizes) in enumerate(ordered):
            milliseconds = [sizes[size] for size in sorted(sizes)]
            tone, label = tones[i % len(tones)], " ".join(key[:2])
            axes[-1].plot(sorted(sizes), milliseconds, "o-", color=tone, label=label)
        ticks = sorted({size for sizes in curves.values() for size in sizes})
        axes[-1].set(xscale="log", yscale="log", xlabel="side of the image, pixels", ylabel="ms")
        axes[-1].set_xticks(ticks, ticks)
        axes[-1].set_xticks([], minor=True)
        axes[-1].legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=7)
    if not (panels or curves):
        axes[0].set_axis_off()
        axes[0].text(0, 0.5, "nothing to draw: only eager was measured, at one size")
    figure.savefig(file, format="png", dpi=120)


def _speed(contenders: dict[str, dict[str, Any]], name: str) -> float:
    return contenders.get(name, {}).get("speedup_over", {}).get("eager", math.nan)
