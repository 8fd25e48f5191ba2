"""All speeds in docs/, merged: a row for each CPU, model, size, batch and number of threads.

Any report of ``benchmark`` below docs/performance is read, so new measurements need no change here.
``performance/cpus.json`` says which folder is of which CPU, and which reports were made with fewer
instructions than it has.
"""

from __future__ import annotations

import fnmatch
import functools
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from contenders import TITLES
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter
from tables_models import decimal, table

import backbones
from backbones.cli.benchmark_report import DTYPES, PLAIN, Cell, rivals, speed
from backbones.cli.reports import is_older, read_report

Report = dict[str, Any]


@dataclass
class Speeds:
    """What is known of one setting.

    Attributes:
        cpu, isa: key of the CPU, and the instruction set that it was restricted to (else "").
        cells: the :class:`Cell` of each column.
        over: by dtype, our speed over the fastest elsewhere, and its name. Each of the others
            counts by the newest row that has both.
        ratios: our speed in float32 over each column of float32.
        rivals: by dtype, our speed over every other contender.
        row: the newest row, which ``date``, ``commit`` and times come from unless said otherwise.
        others: columns whose times are from other, earlier rows, and when these were measured.
        reports: the files of all rows, relative to docs/.
    """

    cpu: str
    isa: str
    model: str
    size: int
    batch: int
    threads: int
    row: dict[str, Any]
    torch: str
    cells: dict[str, Cell] = field(default_factory=dict)
    over: dict[str, tuple[float, str]] = field(default_factory=dict)
    ratios: dict[str, float] = field(default_factory=dict)
    rivals: dict[str, dict[str, float]] = field(default_factory=dict)
    others: dict[str, str] = field(default_factory=dict)
    reports: list[str] = field(default_factory=list)

    @property
    def key(self) -> tuple[Any, ...]:
        return (self.cpu, self.isa, self.model, self.size, self.batch, self.threads)

    @property
    def is_older(self) -> bool:
        return is_older(self.row)


def cpus(docs: Path) -> Report:
    """CPUs that were measured, and the processors that are like them."""
    return read_report(docs / "performance" / "cpus.json")


def reports(docs: Path) -> dict[str, Report]:
    """The reports of whole models, by path relative to docs/."""
    found = {}
    for path in sorted((docs / "performance").rglob("*.json")):
        report = read_report(path)
        results = report.get("results")
        first = results[0] if isinstance(results, list) and results else {}
        timed = "milliseconds" in str(first.get("contenders"))
        if timed and {"model", "size", "macs", "threads"} <= first.keys():
            found[path.relative_to(docs).as_posix()] = report
    return found


def _place(name: str, report: Report, known: Report) -> tuple[Report, str]:
    """The CPU of a report, and what it was restricted to."""
    inside = name.removeprefix("performance/")
    folders = (m for m in known["machines"] if inside.startswith(m["reports"]))
    machine = max(folders, key=lambda m: len(m["reports"]))
    if inside in known["files"]:
        machine = next(m for m in known["machines"] if m["key"] == known["files"][inside])
    restricted = known["restricted"].get(inside, "")
    isa = report["machine"].get("instruction_set") or machine["instruction_set"]
    if not restricted and isa != machine["instruction_set"]:
        restricted = isa
    return machine, restricted


def name_machine(report: Report, file: str, docs: Path) -> None:
    """Give a report's machine the name that readers can look up."""
    machine, restricted = _place(file, report, cpus(docs))
    report["machine"]["name"] = machine["name"]
    if restricted:
        report["machine"]["restricted"] = restricted


def measured(docs: Path) -> list[Speeds]:
    """All settings, sorted; where rows overlap, the newest counts."""
    known, rows = cpus(docs), []
    for name, report in reports(docs).items():
        machine, restricted = _place(name, report, known)
        of_report = machine["key"], restricted, name, str(report["machine"]["torch"])
        for row in report["results"]:
            if row["direction"] == "forward" and row.get("dtype", "float32") == "float32":
                order = row.get("date", ""), not is_older(row), len(row["contenders"])
                rows.append((order, row, of_report))
    # Newest first; of one day, today's kernels, then what was compared with more.
    rows.sort(key=lambda each: each[0], reverse=True)
    found: dict[tuple[Any, ...], Speeds] = {}
    for _, row, (cpu, isa, name, torch) in rows:
        setting = (row["model"], row["size"], row["batch"], row["threads"])
        into = found.setdefault((cpu, isa, *setting), Speeds(cpu, isa, *setting, row, torch))
        into.reports.append(name)
        _add(into, row)
    return [found[key] for key in sorted(found)]


def _add(into: Speeds, row: dict[str, Any]) -> None:
    """Put the cells of a row where there are none yet."""
    cells = speed(row)
    for name in (*PLAIN, *DTYPES):
        cell, there = cells[name], into.cells.get(name, Cell())
        better = there.milliseconds is None and cell.milliseconds is not None
        if better or there == Cell():
            into.cells[name] = cell
            if row is not into.row and cell != Cell():
                into.others[name] = row.get("date", "")
    for title in PLAIN:
        if (name := cells[title].name) in (known := rivals(row, "float32")):
            into.ratios.setdefault(title, known[name])
    for dtype in DTYPES:
        known = into.rivals.setdefault(dtype, {})
        for name, ratio in rivals(row, dtype).items():
            known.setdefault(name, ratio)
        if known:
            name = min(known, key=known.__getitem__)
            into.over[dtype] = (known[name], name)


@functools.cache
def reason(docs: Path, model: str, dtype: str) -> str:
    """Why another library is faster, from performance/losses.json; empty if it is not known."""
    for each in read_report(docs / "performance" / "losses.json")["reasons"]:
        if fnmatch.fnmatch(model, each["models"]) and fnmatch.fnmatch(dtype, each["dtypes"]):
            return str(each["reason"])
    return ""


def median(values: Iterable[float | None]) -> tuple[float | None, int]:
    """The median of what is there, and how many there are."""
    there = [value for value in values if value is not None]
    return (statistics.median(there) if there else None, len(there))


# -- claims of the pages ---------------------------------------------------------------------------

_RIVALS = ("eager", "compile", "OpenVINO")
_COLUMNS = {"compile": "torch.compile"}


def usual(docs: Path, cpu: str) -> list[Speeds]:
    """This library's models on one thread of a CPU, one image of their smallest size, each once."""
    known = set(backbones.list_models())
    found: dict[str, Speeds] = {}
    for each in measured(docs):
        place = (each.cpu, each.isa, each.batch, each.threads)
        if place == (cpu, "", 1, 1) and each.model in known and each.over:
            found.setdefault(each.model, each)
    return list(found.values())


def four_cpus(docs: Path) -> str:
    """Median speed over others on each CPU, with how many models there are, and the losses."""
    rows = []
    for machine in cpus(docs)["machines"]:
        found = usual(docs, machine["key"])
        cells = []
        for rival in _RIVALS:
            value, count = median(each.ratios.get(rival) for each in found)
            cells.append("not measured" if value is None else f"{value:.2f}× ({count})")
        losses = [each for each in found if each.over.get("float32", (1.0, ""))[0] < 1]
        dates = sorted(each.row["date"] for each in found)
        names = ", ".join(f"`{each.model}`" for each in losses) or "none"
        rows.append([machine["name"], machine["models"], *cells, names, dates[-1]])
    head = ["CPU", "", "PyTorch eager", "torch.compile", "OpenVINO", "slower than another library"]
    return table([*head, "newest row"], rows, 2)


def int8_gain(docs: Path) -> str:
    """How much faster int8 is than bfloat16, and where it was measured, in a sentence."""
    parts, missing = [], []
    for machine in cpus(docs)["machines"]:
        found = [
            bf16 / int8
            for each in measured(docs)
            if (each.cpu, each.isa) == (machine["key"], "")
            for bf16, int8 in [[each.cells[d].milliseconds for d in ("bfloat16", "int8")]]
            if bf16 and int8 and each.others.get("bfloat16") == each.others.get("int8")
        ]
        if found:
            slower = sum(value < 1 for value in found)
            parts.append(
                f"on {machine['name']}, int8 is {statistics.median(found):.2f} times as fast as "
                f"bfloat16 (median of {len(found)} settings), slower in {slower or 'none'} of them"
            )
        else:
            missing.append(machine["name"])
    return f"{'; '.join(parts)}. Not measured on: {'; '.join(missing) or 'none'}"


def timm_gain(docs: Path) -> str:
    """How much faster fused models of timm are, and which are slower than in another library."""
    parts = []
    for machine in cpus(docs)["machines"]:
        found = [
            each
            for each in measured(docs)
            if (each.cpu, each.isa, each.batch, each.threads) == (machine["key"], "", 1, 1)
            and each.model.startswith("timm/")
            and "float32" in each.over
        ]
        gains = []
        for rival, title in (("eager", "eager PyTorch"), ("OpenVINO", "OpenVINO")):
            value, count = median(each.ratios.get(rival) for each in found)
            if value is not None:
                gains.append(f"{value:.2f} times as fast as in {title} (median of {count})")
        if gains:
            slower = [f"`{each.model[5:]}`" for each in found if each.over["float32"][0] < 1]
            parts.append(
                f"On {machine['name']} (one image, one thread, float32), fused models of timm are "
                f"{' and '.join(gains)}. Slower than in another library: "
                f"{', '.join(slower) or 'none'}."
            )
    return " ".join(parts) or "No model of timm was measured."


def losses(docs: Path) -> str:
    """Where another library is faster, and what products would take."""
    names = {machine["key"]: machine["name"] for machine in cpus(docs)["machines"]}
    rows = []
    for each in measured(docs):
        for dtype, (ratio, rival) in each.over.items():
            time = each.cells[dtype].milliseconds
            if ratio >= 1 or time is None:
                continue
            rate = each.row.get("matmul_gflops", {}).get(dtype)
            alone = 2e-6 * each.row["macs"] * each.batch / rate if rate else None
            setting = [f"`{each.model}`", f"{names[each.cpu]}, {each.isa}".rstrip(", ")]
            setting += [str(each.batch), str(each.threads), dtype, decimal(time, 2)]
            over = f"{decimal(ratio, 3)}× {TITLES.get(rival, rival)}"
            why = ["–" if alone is None else decimal(alone, 2), over]
            date = each.row.get("date", "") + (", older" if each.is_older else "")
            rows.append([*setting, *why, date, reason(docs, each.model, dtype) or "–"])
    head = ["model", "CPU", "images", "threads", "dtype", "ms", "products alone", "over"]
    return table([*head, "measured", "why"], rows)


def unmeasured(docs: Path) -> str:
    """What was never measured on which CPU."""
    parts = []
    for machine in cpus(docs)["machines"]:
        rows = [each for each in measured(docs) if (each.cpu, each.isa) == (machine["key"], "")]
        there = {
            **{name: any(name in each.ratios for each in rows) for name in list(PLAIN)[1:]},
            "OpenVINO in bfloat16": any(
                "openvino_bf16" in each.rivals["bfloat16"] for each in rows
            ),
            "int8": any(each.cells["int8"].milliseconds for each in rows),
        }
        missing = [_COLUMNS.get(name, name) for name, found in there.items() if not found]
        if missing:
            parts.append(f"on {machine['name']}: {', '.join(missing)}")
    return "; ".join(parts) or "nothing"


# Whom the picture of README compares with: a column of the page Speed, and its colour.
_COLOURS = {
    "eager": "#3b3f46",
    "compile": "#d9822b",
    "ONNX Runtime": "#8e4ec6",
    "OpenVINO": "#1b998b",
}


def draw_speed(found: Mapping[str, Sequence[Speeds]], file: IO[bytes]) -> None:
    """A row for each CPU and contender: a mark for each model, and a bar at the median."""
    rows = [
        (cpu, rival, values)
        for cpu, models in found.items()
        for rival in _COLOURS
        if (values := [each.ratios[rival] for each in models if rival in each.ratios])
    ]
    figure = Figure(figsize=(8.6, 0.9 + 0.32 * len(rows)), layout="constrained")
    axis = figure.subplots()
    for place, (_, rival, values) in enumerate(rows):
        colour = _COLOURS[rival]
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


CLAIMS: dict[str, Callable[..., str]] = {
    function.__name__: function
    for function in (four_cpus, int8_gain, timm_gain, losses, unmeasured)
}
