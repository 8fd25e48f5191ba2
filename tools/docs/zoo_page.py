"""What the pages Zoo and Speed and the families' pages show, in HTML and Markdown.

Nothing is measured here: figures of the originals come from ``tests/reference``, errors from
``docs/parity.json``, latencies from the page Speed (``tools/speeds.py``).
Missing figures are shown as dashes.
"""

from __future__ import annotations

import html
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import speeds  # noqa: E402
from contenders import TITLES  # noqa: E402
from speeds import Speeds  # noqa: E402
from tables_families import DIRECT, claim, licence, links  # noqa: E402
from tables_models import table  # noqa: E402

import backbones  # noqa: E402
from backbones.cli import parity  # noqa: E402
from backbones.cli.benchmark_report import DTYPES, PLAIN, Cell  # noqa: E402
from backbones.cli.reports import read_report  # noqa: E402
from backbones.core.registry import published_weights  # noqa: E402

PARITY = DOCS / "parity.json"
DASH, _SPACE = "–", "\N{NO-BREAK SPACE}"


@dataclass(frozen=True)
class Row:
    """One variant; missing figures are None.

    Attributes:
        macs_g: of the original, for images of ``macs_size`` pixels.
        top1: on ImageNet-1k, as reported by the authors, for images of ``top1_size`` pixels.
        claim: the reported result in words, if it is not a plain top-1.
        plot_macs_g: MACs at ``top1_size``: ``macs_g`` if the sizes agree, else the authors' figure.
        error: greatest relative difference between its output and the original's.
        latency_ms, fused_ms: of one image of ``latency_size`` pixels: eager in the better memory
            format, and after ``fuse()``.
        pretrained: the weights that ``pretrained=True`` downloads; None if there are none.
        url: of these weights, or else the first place where the authors published any.
    """

    name: str
    family: str
    params_m: float
    macs_g: float
    macs_size: int
    top1: float | None
    top1_size: int
    claim: str
    plot_macs_g: float | None
    error: float | None
    latency_ms: float | None
    fused_ms: float | None
    latency_size: int | None
    licence: str
    pretrained: str | None
    url: str | None


def latencies(measured: Sequence[Speeds]) -> list[Speeds]:
    """One image on one thread of the CPU that most of the variants were measured on."""
    names = {name for _, name in parity.variants()}
    usual = [m for m in measured if m.model in names and (m.isa, m.batch, m.threads) == ("", 1, 1)]
    models: dict[str, set[str]] = {}
    for each in usual:
        models.setdefault(each.cpu, set()).add(each.model)
    chosen = max(models, key=lambda cpu: len(models[cpu]), default=None)
    return [each for each in usual if each.cpu == chosen]


def rows(measured: Sequence[Speeds]) -> list[Row]:
    """All variants, sorted by family and size, with the speeds that the page Speed shows."""
    errors = read_report(PARITY)["results"]
    by_model: dict[str, dict[int, Speeds]] = {}
    for each in latencies(measured):
        by_model.setdefault(each.model, {})[each.size] = each
    found = [
        _row(family, name, errors.get(name, {}).get("output"), by_model.get(name, {}))
        for family, name in parity.variants()
    ]
    return sorted(found, key=lambda row: (row.family, row.params_m, row.name))


def _row(family: str, name: str, error: float | None, measured: dict[int, Speeds]) -> Row:
    figures = parity.reference(family, name)
    tag, cfg = next(iter(published_weights(name).items()))
    macs_g, macs_size = figures["macs"] / 1e9, figures["cases"][0]["input"][-1]
    top1, remark, claimed_macs_g = claim(figures["reported"])
    if top1 is not None and "in22k" in tag:
        remark = "from ImageNet-22k"
    top1_size = cfg.input_size[-1]
    speed = measured.get(top1_size) or (measured[min(measured)] if measured else None)
    named = not figures["licence"].startswith(("none", "no "))
    return Row(
        name=name,
        family=family,
        params_m=figures["params"] / 1e6,
        macs_g=macs_g,
        macs_size=macs_size,
        top1=top1,
        top1_size=top1_size,
        claim=remark,
        plot_macs_g=macs_g if macs_size == top1_size else claimed_macs_g,
        error=error,
        latency_ms=speed and speed.cells["eager"].milliseconds,
        fused_ms=speed and speed.cells["float32"].milliseconds,
        latency_size=speed and speed.size,
        licence=licence(figures) if named else "none stated",
        pretrained=tag if cfg.has_weights else None,
        url=cfg.url if cfg.has_weights else next(iter(links(figures)), None),
    )


def machine_line(measured: Sequence[Speeds]) -> str:
    """A sentence on the CPU that the latencies were measured on."""
    found = latencies(measured)
    if not found:
        return "No latencies have been measured yet (`python tools/benchmark.py --op zoo`)."
    names = {machine["key"]: machine["name"] for machine in speeds.cpus(DOCS)["machines"]}
    dates = sorted(each.row.get("date", "") for each in found)
    return (
        "Latencies are for one image of that size in float32 on one thread of "
        f"{names[found[0].cpu]}, measured from {dates[0]} to {dates[-1]}; both forms took turns in "
        "one process, and medians are shown. [Speed](speed.md) has other CPUs and settings."
    )


def _number(value: float | None, digits: int) -> str:
    return DASH if value is None else f"{value:.{digits}f}"


def _cell(shown: str, value: float | str | None = None, *, number: bool = True) -> str:
    """A table cell with its sort key; cells without ``value`` are sorted to the end."""
    key = "" if value is None else f' data-key="{html.escape(str(value))}"'
    return f"<td{' class=number' if number else ''}{key}>{shown}</td>"


def _remark(text: str) -> str:
    return f' <span class="remark">{html.escape(text)}</span>' if text else ""


def _weights(row: Row) -> str:
    """A link to the weights."""
    if row.url is None:
        return DASH
    word = row.pretrained or ("file" if row.url.endswith(DIRECT) else "page")
    return f'<a href="{html.escape(row.url)}">{html.escape(word)}</a>'


def _table_row(row: Row) -> str:
    top1 = row.claim if row.top1 is None and row.claim else _number(row.top1, 1)
    top1_remark = f"{row.top1_size}²" if row.top1 is not None else ""
    if row.top1 is not None and row.claim:
        top1_remark += ", 22k"
    size_remark = _remark(f"{row.latency_size}²") if row.latency_size else ""
    family = f'<a href="families/{row.family}.html">{row.family}</a>'
    cells = [
        f'<th scope="row" data-key="{row.name}"><code>{row.name}</code></th>',
        _cell(family, row.family, number=False),
        _cell(_number(row.params_m, 2), row.params_m),
        _cell(_number(row.macs_g, 2) + _remark(f"{row.macs_size}²"), row.macs_g),
        _cell(top1 + _remark(top1_remark), row.top1),
        _cell(DASH if row.error is None else f"{row.error:.1e}", row.error),
        _cell(_number(row.latency_ms, 1) + size_remark, row.latency_ms),
        _cell(_number(row.fused_ms, 1) + size_remark, row.fused_ms),
        _cell(row.licence, row.licence, number=False),
        _cell(_weights(row), row.pretrained, number=False),
    ]
    return f'<tr id="{row.name}">{"".join(cells)}</tr>'


_NUMBERS = ("M params", "G MACs", "Reported top-1, %", "Parity error", "CPU, ms", "CPU fused, ms")
HEADINGS = (
    *(("Variant", "text"), ("Family", "text")),
    *((name, "number") for name in _NUMBERS),
    *(("Licence", "text"), ("Weights", "text")),
)


def _options(values: Sequence[Any], chosen: Any = None) -> str:
    texts = [(html.escape(str(value)), " selected" * (value == chosen)) for value in values]
    return "".join(f'<option value="{text}"{mark}>{text}</option>' for text, mark in texts)


def zoo(data: list[Row]) -> str:
    """Filters, table and plots as HTML, driven by ``docs/assets/zoo.js``."""
    families = sorted({row.family for row in data})
    licences = sorted({row.licence for row in data})
    headings = "".join(
        f'<th scope="col" data-type="{kind}"><button type="button">{name}</button></th>'
        for name, kind in HEADINGS
    )
    # A script element would end at the first "</", even inside a string.
    figures = json.dumps([asdict(row) for row in data]).replace("</", "<\\/")
    everything = '<option value="">all</option>'
    return f"""\
<div class="zoo-plots">
<div class="zoo-plot" id="zoo-macs" role="img" aria-label="Accuracy against MACs"></div>
<div class="zoo-plot" id="zoo-latency" role="img" aria-label="Accuracy against CPU latency"></div>
</div>
<form class="zoo-filters" id="zoo-filters">
<label>Name <input type="search" name="name" placeholder="van_b" autocomplete="off"></label>
<label>Family <select name="family">{everything}{_options(families)}</select></label>
<label>Licence <select name="licence">{everything}{_options(licences)}</select></label>
<label>At most <input type="number" name="params" min="0" step="any"> M params</label>
<label>At most <input type="number" name="macs" min="0" step="any"> G MACs</label>
<label><input type="checkbox" name="pretrained"> <code>pretrained=True</code></label>
<button type="reset" class="md-button">Clear</button>
<output id="zoo-count" aria-live="polite"></output>
</form>
<div class="zoo-scroll"><table class="zoo" id="zoo-table">
<thead><tr>{headings}</tr></thead>
<tbody>{"".join(_table_row(row) for row in data)}</tbody>
</table></div>
<script type="application/json" id="zoo-data">{figures}</script>
<script src="assets/plotly.min.js" defer></script>
<script src="assets/zoo.js" defer></script>"""


def variants_table(data: list[Row], family: str) -> str:
    """The variants of one family as a Markdown table, smallest first."""
    cells, has_claims = [], False
    for row in (row for row in data if row.family == family):
        top1 = row.claim if row.top1 is None and row.claim else _number(row.top1, 1)
        if row.top1 is not None:
            top1 += f"{_SPACE}at{_SPACE}{row.top1_size}²" + (f", {row.claim}" if row.claim else "")
        macs = f"{_number(row.macs_g, 2)}{_SPACE}at{_SPACE}{row.macs_size}²"
        cells.append([f"`{row.name}`", _number(row.params_m, 2), macs, top1, _weights(row)])
        has_claims = has_claims or row.top1 is not None or bool(row.claim)
    head = ["Variant", "M params", "G MACs", "Reported top-1, %", "Weights"]
    text = table(head, cells).replace("---: |\n", "--- |\n", 1)
    return f"{text}\n\n{_sources(family)}" if has_claims else text


def _sources(family: str) -> str:
    """The sources of a family's accuracies."""
    found = {
        parity.reference(family, name)["source"] for of, name in parity.variants() if of == family
    }
    repositories = sorted({re.split(r"[@ ]", source)[0] for source in found})
    links = " and ".join(f"[{name}](https://github.com/{name})" for name in repositories)
    return f"Accuracies are quoted from the paper, or from {links}."


def families_table(data: list[Row]) -> str:
    """All families with the idea stated in their module's docstring."""
    cells = []
    for family in backbones.list_families():
        sizes = [row.params_m for row in data if row.family == family]
        module = getattr(backbones, family)
        name, opening = min(module.__all__, key=len), (module.__doc__ or "").split("\n")[0]
        idea = opening.rstrip(".").split(": ", 1)[1]
        span = f"{min(sizes):.1f}{_SPACE}…{_SPACE}{max(sizes):.1f}"
        cells.append([f"[{name}]({family}.md)", idea[0].upper() + idea[1:], str(len(sizes)), span])
    return table(["Family", "Idea", "Variants", "M params"], cells, 2)


# -- the page Speed --------------------------------------------------------------------------------


def look_up() -> str:
    """The processors and what was measured of each."""
    known = speeds.cpus(DOCS)
    names = {machine["key"]: machine["name"] for machine in known["machines"]}
    rows = []
    for each in known["processors"]:
        key, _, isa = each["measured"].partition("/")
        if not key:
            result = '<td class="remark">not measured</td>'
        else:
            shown = f"on {names[key]}" + (f", restricted to {isa}" if isa else "")
            value = html.escape(f"{key}/{isa}")
            button = f'<button type="button" class="md-button" data-cpu="{value}">show</button>'
            result = f"<td>{html.escape(shown)} {button}</td>"
        pattern = html.escape(each["pattern"])
        rows.append(
            f'<tr data-pattern="{pattern}"><td>{html.escape(each["name"])}<br>'
            f'<span class="remark">{html.escape(each["code"])}</span></td>'
            f'<td class="like">{html.escape(each["like"])}</td>'
            f"<td><code>{each['instruction_set']}</code></td>{result}</tr>"
        )
    head = "".join(f"<th>{t}</th>" for t in ("CPU", "For example", "Instruction set", "Measured"))
    return (
        '<form id="cpu-form" class="zoo-filters"><label>Your CPU <input type="search" name="cpu" '
        'placeholder="EPYC 9654, Core i7-12700, m7g" autocomplete="off"></label> '
        '<output id="cpu-count"></output></form>\n'
        '<div class="zoo-scroll"><table class="zoo" id="cpu-table">\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n" + "\n".join(rows) + "\n</tbody></table></div>"
    )


def _layers() -> dict[tuple[str, str], str]:
    """By instruction set and model, how many layers are in int8, "n of m"."""
    found = {}
    for path in sorted((DOCS / "performance").glob("int8_accuracy*.json")):
        report = read_report(path)
        for row in report["results"]:
            counts = [f["quantized"] for f in row["forms"].values() if f.get("quantized")]
            if counts:
                place = (report["machine"]["instruction_set"], row["model"])
                found[place] = f"{max(counts)} of {row['layers']}"
    return found


def _speed_cell(cell: Cell, other: str | None) -> list[Any] | None:
    """Time, contender, reason of a failure, and the date if it is another row's."""
    if cell == Cell():
        return None
    return [cell.milliseconds, TITLES.get(cell.name, cell.name), cell.failed, other]


def entries(measured: Sequence[Speeds]) -> list[dict[str, Any]]:
    """What the script shows, a mapping for each setting."""
    known = speeds.cpus(DOCS)
    isas = {machine["key"]: machine["instruction_set"] for machine in known["machines"]}
    published = {row.name: row for row in rows([])}
    layers = _layers()
    found = []
    for each in measured:
        row = published.get(each.model)
        fused = each.row["contenders"].get("fused", {})
        is_timm = each.model.startswith("timm/")
        peak = fused.get("peak_bytes")
        found.append(
            {
                "cpu": f"{each.cpu}/{each.isa}",
                "model": each.model,
                "family": row.family if row else "timm" if is_timm else "training only",
                "size": each.size,
                "batch": each.batch,
                "threads": each.threads,
                "top1": row.top1 if row and each.size == row.top1_size else None,
                "params": row and row.params_m,
                "cells": {
                    n: _speed_cell(each.cells[n], each.others.get(n)) for n in (*PLAIN, *DTYPES)
                },
                "layers": layers.get((each.isa or isas[each.cpu], each.model)),
                "over": {
                    d: [ratio, TITLES.get(name, name), speeds.reason(DOCS, each.model, d)]
                    for d, (ratio, name) in each.over.items()
                },
                "images": fused.get("images_per_second"),
                "memory": None if peak is None else peak / 2**20,
                "date": each.row.get("date"),
                "commit": each.row.get("commit"),
                "older": each.is_older,
                "versions": {"torch": each.torch, **each.row.get("versions", {})},
            }
        )
    return found


def speed_table(measured: Sequence[Speeds]) -> str:
    """The filters, the empty table, and the data that the script fills it from."""
    rows = entries(measured)
    known = speeds.cpus(DOCS)
    names = {machine["key"]: machine["name"] for machine in known["machines"]}
    places = sorted({row["cpu"] for row in rows}, key=lambda cpu: (cpu.partition("/")[2], cpu))

    def name(place: str) -> str:
        key, _, isa = place.partition("/")
        kind = {"": "", "none": ", without our kernels"}.get(isa, f", restricted to {isa}")
        return names[key] + kind

    cpus = "".join(f'<option value="{p}">{html.escape(name(p))}</option>' for p in places)
    numbers = {key: sorted({row[key] for row in rows}) for key in ("batch", "threads")}
    families = sorted({row["family"] for row in rows})
    everything = '<option value="">all</option>'
    data = json.dumps(rows, ensure_ascii=False, separators=(",", ":")).replace("</", "<\\/")
    columns = json.dumps({"plain": list(PLAIN), "dtypes": list(DTYPES)})
    return f"""\
<form id="speed-filters" class="zoo-filters">
<label>CPU <select name="cpu">{everything}{cpus}</select></label>
<label>Model <input type="search" name="model" placeholder="van_b" autocomplete="off"></label>
<label>Family <select name="family">{everything}{_options(families)}</select></label>
<label>Images <select name="batch">{everything}{_options(numbers["batch"], 1)}</select></label>
<label>Threads <select name="threads">{everything}{_options(numbers["threads"], 1)}</select></label>
<label>dtype <select name="dtype">{everything}{_options(DTYPES)}</select></label>
<label><input type="checkbox" name="losses"> only losses</label>
<button type="reset" class="md-button">Reset</button>
<output id="speed-count"></output>
</form>
<div class="zoo-scroll"><table class="zoo speed" id="speed-table">
<thead></thead><tbody></tbody></table></div>
<noscript>The table needs JavaScript; its figures are in <code>docs/performance</code>.</noscript>
<script type="application/json" id="speed-columns">{columns}</script>
<script type="application/json" id="speed-data">{data}</script>
<script src="assets/speed.js"></script>"""
