"""The page Speed: a look-up of CPUs, and a table of all measurements that a script filters.

Nothing is measured here; see ``tools/speeds.py`` for what is merged, and how.
"""

from __future__ import annotations

import html
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import speeds  # noqa: E402
import zoo_page  # noqa: E402
from contenders import TITLES  # noqa: E402

from backbones.cli.benchmark_report import DTYPES, PLAIN, Cell  # noqa: E402

DOCS = ROOT / "docs"


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
        report = json.loads(path.read_text(encoding="utf-8"))
        for row in report["results"]:
            counts = [f["quantized"] for f in row["forms"].values() if f.get("quantized")]
            if counts:
                place = (report["machine"]["instruction_set"], row["model"])
                found[place] = f"{max(counts)} of {row['layers']}"
    return found


def _cell(cell: Cell, other: str | None) -> list[Any] | None:
    """Time, contender, reason of a failure, and the date if it is another row's."""
    if cell == Cell():
        return None
    return [cell.milliseconds, TITLES.get(cell.name, cell.name), cell.failed, other]


def entries(measured: Sequence[speeds.Speeds]) -> list[dict[str, Any]]:
    """What the script shows, a mapping for each setting."""
    known = speeds.cpus(DOCS)
    isas = {machine["key"]: machine["instruction_set"] for machine in known["machines"]}
    published = {row.name: row for row in zoo_page.rows([])}
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
                "cells": {n: _cell(each.cells[n], each.others.get(n)) for n in (*PLAIN, *DTYPES)},
                "layers": layers.get((each.isa or isas[each.cpu], each.model)),
                "over": {d: [r, TITLES.get(n, n)] for d, (r, n) in each.over.items()},
                "images": fused.get("images_per_second"),
                "memory": None if peak is None else peak / 2**20,
                "date": each.row.get("date"),
                "commit": each.row.get("commit"),
                "older": each.is_older,
                "versions": {"torch": each.torch, **each.row.get("versions", {})},
            }
        )
    return found


def _options(values: Sequence[Any], chosen: Any = None) -> str:
    return "".join(
        f"<option{' selected' if value == chosen else ''}>{html.escape(str(value))}</option>"
        for value in values
    )


def table(measured: Sequence[speeds.Speeds]) -> str:
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
