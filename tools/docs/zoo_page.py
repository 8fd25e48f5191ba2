"""The table and the plots of the zoo page, and the tables of the families' pages.

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
from speeds import Speeds  # noqa: E402

import backbones  # noqa: E402
from backbones.cli import parity  # noqa: E402
from backbones.core.registry import published_weights  # noqa: E402

PARITY = DOCS / "parity.json"
DIRECT = (".pth", ".tar", ".pt")
DASH = "–"


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
    errors = json.loads(PARITY.read_text())
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
    top1, claim, claimed_macs_g = _claim(figures["reported"])
    if top1 is not None and "in22k" in tag:
        claim = "from ImageNet-22k"
    top1_size = cfg.input_size[-1]
    speed = measured.get(top1_size) or (measured[min(measured)] if measured else None)
    published = [each["url"] for each in figures["weights"] if each.get("url")]
    published.sort(key=lambda url: not url.endswith(DIRECT))
    return Row(
        name=name,
        family=family,
        params_m=figures["params"] / 1e6,
        macs_g=macs_g,
        macs_size=macs_size,
        top1=top1,
        top1_size=top1_size,
        claim=claim,
        plot_macs_g=macs_g if macs_size == top1_size else claimed_macs_g,
        error=error,
        latency_ms=speed and speed.cells["eager"].milliseconds,
        fused_ms=speed and speed.cells["float32"].milliseconds,
        latency_size=speed and speed.size,
        licence=_licence(figures["licence"]),
        pretrained=tag if cfg.has_weights else None,
        url=cfg.url if cfg.has_weights else next(iter(published), None),
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


def _claim(reported: dict[str, Any]) -> tuple[float | None, str, float | None]:
    """ImageNet top-1, a remark, and the G MACs reported with it."""
    if reported.get("top1") is not None:
        return reported["top1"], "", reported.get("flops_g")
    for how, figures in reported.items():
        if isinstance(figures, dict) and "top1" in figures:
            return figures["top1"], how.replace("_", " "), figures.get("flops_g")
    for dataset, accuracy in reported.get("medmnist_acc", {}).items():
        return None, f"{accuracy} ({dataset})", None
    return None, "", None


def _licence(text: str) -> str:
    """The licence's name, without the remarks, which the family's page has."""
    return "none stated" if text.startswith(("none", "no ")) else re.sub(r" \(.*", "", text)


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


def _options(values: list[str]) -> str:
    return "".join(f'<option value="{v}">{v}</option>' for v in values)


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
    parts = [
        '<div class="zoo-plots">',
        '<div class="zoo-plot" id="zoo-macs" role="img" aria-label="Accuracy against MACs"></div>',
        '<div class="zoo-plot" id="zoo-latency" role="img" '
        'aria-label="Accuracy against CPU latency"></div>',
        "</div>",
        '<form class="zoo-filters" id="zoo-filters">',
        '<label>Name <input type="search" name="name" placeholder="van_b" autocomplete="off">'
        "</label>",
        f'<label>Family <select name="family"><option value="">all</option>{_options(families)}'
        "</select></label>",
        f'<label>Licence <select name="licence"><option value="">all</option>{_options(licences)}'
        "</select></label>",
        '<label>At most <input type="number" name="params" min="0" step="any"> M params</label>',
        '<label>At most <input type="number" name="macs" min="0" step="any"> G MACs</label>',
        '<label><input type="checkbox" name="pretrained"> <code>pretrained=True</code></label>',
        '<button type="reset" class="md-button">Clear</button>',
        '<output id="zoo-count" aria-live="polite"></output>',
        "</form>",
        '<div class="zoo-scroll"><table class="zoo" id="zoo-table">',
        f"<thead><tr>{headings}</tr></thead>",
        f"<tbody>{''.join(_table_row(row) for row in data)}</tbody>",
        "</table></div>",
        f'<script type="application/json" id="zoo-data">{figures}</script>',
        '<script src="assets/plotly.min.js" defer></script>',
        '<script src="assets/zoo.js" defer></script>',
    ]
    return "\n".join(parts)


def variants_table(data: list[Row], family: str) -> str:
    """The variants of one family as a Markdown table, smallest first."""
    lines = [
        "| Variant | M params | G MACs | Reported top-1, % | Weights |",
        "|---|---:|---:|---:|---|",
    ]
    for row in data:
        if row.family == family:
            top1 = row.claim if row.top1 is None and row.claim else _number(row.top1, 1)
            if row.top1 is not None:
                top1 += f"\N{NO-BREAK SPACE}at\N{NO-BREAK SPACE}{row.top1_size}²"
                top1 += f", {row.claim}" if row.claim else ""
            cells = (
                f"`{row.name}`",
                _number(row.params_m, 2),
                f"{_number(row.macs_g, 2)}\N{NO-BREAK SPACE}at\N{NO-BREAK SPACE}{row.macs_size}²",
                top1,
                _weights(row),
            )
            lines.append("| " + " | ".join(cells) + " |")
    if any(row.top1 is not None or row.claim for row in data if row.family == family):
        lines += ["", _sources(family)]
    return "\n".join(lines)


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
    lines = ["| Family | Idea | Variants | M params |", "|---|---|---:|---|"]
    for family in backbones.list_families():
        sizes = [row.params_m for row in data if row.family == family]
        module = getattr(backbones, family)
        name, opening = min(module.__all__, key=len), (module.__doc__ or "").split("\n")[0]
        idea = opening.rstrip(".").split(": ", 1)[1]
        lines.append(
            f"| [{name}]({family}.md) | {idea[0].upper()}{idea[1:]} | {len(sizes)} "
            f"| {min(sizes):.1f}\N{NO-BREAK SPACE}…\N{NO-BREAK SPACE}{max(sizes):.1f} |"
        )
    return "\n".join(lines)
