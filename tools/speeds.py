"""All speeds in docs/, merged: a row for each CPU, model, size, batch and number of threads.

Any report of ``benchmark`` below docs/performance is read, so new measurements need no change here.
``performance/cpus.json`` says which folder is of which CPU, and which reports were made with fewer
instructions than it has.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tables_models import table

import backbones
from backbones.cli import parity
from backbones.cli.benchmark_report import DTYPES, PLAIN, Cell, is_older, rivals, speed
from backbones.cli.provenance import kernels
from backbones.core.registry import published_weights

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
        return is_older(self.row, kernels())


def cpus(docs: Path) -> Report:
    """CPUs that were measured, and the processors that are like them."""
    found: Report = json.loads((docs / "performance" / "cpus.json").read_text(encoding="utf-8"))
    return found


def reports(docs: Path) -> dict[str, Report]:
    """The reports of whole models, by path relative to docs/."""
    found = {}
    for path in sorted((docs / "performance").rglob("*.json")):
        report = json.loads(path.read_text(encoding="utf-8"))
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
    known = cpus(docs)
    rows = []
    for name, report in reports(docs).items():
        machine, restricted = _place(name, report, known)
        place = (machine["key"], restricted)
        for row in report["results"]:
            if row["direction"] == "forward" and row.get("dtype", "float32") == "float32":
                rows.append((place, name, str(report["machine"]["torch"]), row))
    # Newest first; of one day, what was compared with more.
    rows.sort(key=lambda each: (each[3].get("date", ""), len(each[3]["contenders"])), reverse=True)
    found: dict[tuple[Any, ...], Speeds] = {}
    for (cpu, isa), name, torch, row in rows:
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


def median(values: Iterable[float | None]) -> tuple[float | None, int]:
    """The median of what is there, and how many there are."""
    there = [value for value in values if value is not None]
    return (statistics.median(there) if there else None, len(there))


# -- claims of the pages ---------------------------------------------------------------------------

# Of our names, those that timm has, too.
TIMM_NAMES = frozenset(
    [f"efficientvit_m{i}" for i in range(6)]
    + [f"shvit_s{i}" for i in range(1, 5)]
    + [f"inception_next_{size}" for size in ("atto", "tiny", "small", "base")]
)
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
    head = [
        "CPU",
        "",
        "PyTorch eager",
        "torch.compile",
        "OpenVINO",
        "slower than another library",
        "newest row",
    ]
    return table(head, rows, 2)


def families(docs: Path) -> str:
    """How many families there are, in a word."""
    numbers = [
        "zero",
        "one",
        "two",
        "three",
        "four",
        "five",
        "six",
        "seven",
        "eight",
        "nine",
        "ten",
    ]
    numbers += ["eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen"]
    numbers += ["eighteen", "nineteen", "twenty"]
    count = len(backbones.list_families())
    return numbers[count] if count < len(numbers) else str(count)


# What the authors say of families' licences beyond a name: code, weights.
_LICENCES = {
    "ecanet": ("MIT", "none stated"),
    "favit": ("none stated", "none published"),
    "proxylessnas": ("MIT", "none stated"),
    "ravlt": ("none stated", "MIT"),
    "van": ("Apache-2.0 ¹", "Apache-2.0 ¹"),
}


def readme_models(docs: Path) -> str:
    """A line for each family: figures as published, timm, downloads, licences, parity."""
    errors = json.loads((docs / "parity.json").read_text(encoding="utf-8"))
    rows = []
    for family in backbones.list_families():
        names = [name for found, name in parity.variants() if found == family]
        figures = [parity.reference(family, name) for name in names]
        top1 = [top for each in figures if (top := _top1(each["reported"])) is not None]
        size = _span([each["params"] / 1e6 for each in figures], 1)
        with_weights = sum(
            bool(next(iter(published_weights(name).values())).has_weights) for name in names
        )
        owned = sum(name in TIMM_NAMES for name in names)
        code = figures[0]["licence"].partition(" (")[0]
        published = any(each["weights"] for each in figures)
        code, weights = _LICENCES.get(family, (code, code if published else "none published"))
        worst = max(errors[name]["output"] for name in names)
        title = _title(docs, family)
        rows.append(
            [
                f"[{title}](docs/families/{family}.md)",
                f"{len(names)}, `{names[0]}` …",
                _span(top1, 1) if top1 else "–",
                size,
                f"{owned} of {len(names)}" if owned else "no",
                f"{with_weights} of {len(names)}",
                *(code, weights, f"{worst:.0e}".replace("e-0", "e-")),
            ]
        )
    head = ["Family", "Variants", "Top-1, %", "M params", "In timm", "Downloads", "Code", "Weights"]
    return table([*head, "Parity ²"], rows, 9)


def _title(docs: Path, family: str) -> str:
    """The heading of a family's page."""
    page = (docs / "families" / f"{family}.md").read_text(encoding="utf-8")
    return re.search(r"^# (.+)$", page, re.MULTILINE)[1]  # type: ignore[index]


def _span(values: list[float], digits: int) -> str:
    low, high = (f"{value:.{digits}f}" for value in (min(values), max(values)))
    return low if low == high else f"{low} – {high}"


def _top1(reported: dict[str, Any]) -> float | None:
    """ImageNet top-1 as published, fine-tuned if there is no other."""
    for each in (reported, *(v for v in reported.values() if isinstance(v, dict))):
        if each.get("top1") is not None:
            return float(each["top1"])
    return None


def counts(docs: Path) -> str:
    """How many variants there are, and which have no weights to download."""
    names = [name for _, name in parity.variants()]
    without: dict[str, list[str]] = {}
    for family, name in parity.variants():
        if not next(iter(published_weights(name).values())).has_weights:
            without.setdefault(family, []).append(name)
    sizes = {family: sum(found == family for found, _ in parity.variants()) for family in without}
    parts = [
        f"all of {_title(docs, family)}"
        if len(found) == sizes[family]
        else ", ".join(f"`{name}`" for name in found)
        for family, found in without.items()
    ]
    missing = sum(map(len, without.values()))
    return f"{missing} of {len(names)} variants have none: {', '.join(parts)}"


def worst_parity(docs: Path) -> str:
    """The greatest errors of an output and of a stage's map, and whose they are."""
    errors = json.loads((docs / "parity.json").read_text(encoding="utf-8"))
    worst = {key: max(errors, key=lambda name: errors[name][key]) for key in ("output", "stages")}
    shown = [f"{errors[name][key]:.1e} (`{name}`)" for key, name in worst.items()]
    return f"{shown[0]} for outputs and {shown[1]} for maps of stages"


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


CLAIMS: dict[str, Callable[..., str]] = {
    function.__name__: function
    for function in (
        *(four_cpus, families, readme_models, counts, worst_parity),
        *(int8_gain, timm_gain, unmeasured),
    )
}
