"""Present the reports of ``benchmark``: table, growth with size, comparison, plot."""

from __future__ import annotations

import math
from typing import IO, Any

__all__ = ["SETTING", "comparison", "describe", "draw", "row_key", "scaling", "table"]

# The settings of a row.
SETTING = ("model", "size", "batch", "threads", "dtype", "direction")


def row_key(row: dict[str, Any]) -> tuple[Any, ...]:
    """The settings of a row as a key."""
    return tuple(row[part] for part in SETTING)


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
    return "\n".join([*lines, *scaling(report)]) + "\n"


def scaling(report: dict[str, Any]) -> list[str]:
    """Growth of time with pixels, for models measured at several sizes."""
    lines = []
    for key, sizes in _by_size(report).items():
        (first, start), *_, (last, end) = sorted(sizes.items())
        power = math.log(end / start) / (2 * math.log(last / first))
        label = ", ".join(map(str, key))
        lines.append(f"- {label}: from {first} to {last} time grows as pixels to the {power:.2f}")
    return ["", "Growth with resolution:", "", *lines] if lines else []


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
        axes[0].text(0, 0.5, "neither a contender beside eager nor several sizes to draw")
    figure.savefig(file, format="png", dpi=120)


def _speed(contenders: dict[str, dict[str, Any]], name: str) -> float:
    return contenders.get(name, {}).get("speedup_over", {}).get("eager", math.nan)
