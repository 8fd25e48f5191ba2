"""Tables of the pages on int8, learning and parity, from the reports of ``accuracy.py``."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from contenders import TITLES
from tables_models import Report, table, titles

from backbones.cli import parity as originals

Row = dict[str, Any]

# -- int8 ------------------------------------------------------------------------------------------

DROP, AGREEMENT, PSNR_DROP = 0.3, 99.0, 0.1  # targets: points, %, dB
INT8 = ("int8", "int8_calibrated")
FORMS = ("fused", "bfloat16", *INT8)
TIMED = ("fused", "fused+bfloat16", *INT8)


def _of_kind(report: Report, kind: str) -> list[Row]:
    rows = [row for row in report["results"] if row["kind"] == kind]
    return sorted(rows, key=lambda row: row["family"])


def _within(figures: Row, exact: Row) -> bool:
    """Whether a form meets the targets; float arithmetic on shares of a few hundred images."""
    drop = exact["top1"] - figures["top1"]
    return bool(drop <= DROP + 1e-9 and figures["agreement"] >= AGREEMENT - 1e-9)


def _difference(figures: Row | None, exact: Row, has_aim: bool) -> str:
    if figures is None or "top1" not in figures:
        return "–"
    text = f"{_signed(figures['top1'] - exact['top1'])} ({figures['agreement']:.1f})"
    return text if not has_aim or _within(figures, exact) else f"**{text}**"


def _signed(value: float, digits: int = 2) -> str:
    return f"{round(value, digits) + 0.0:+.{digits}f}".replace("-", "−")


def _quantized(row: Row) -> str:
    counts = {form.get("quantized") for form in map(row["forms"].get, INT8) if form is not None}
    known = sorted(count for count in counts if count is not None)
    return f"{'/'.join(map(str, known))} of {row['layers']}" if known else "–"


def int8_accuracy(report: Report) -> str:
    """Top-1 before ``fuse()``, and the difference of each form."""
    rows = [
        [row["family"], f"`{row['model']}`", _quantized(row)]
        + [f"{row['forms']['float32']['top1']:.2f}"]
        + [_difference(row["forms"].get(f), row["forms"]["float32"], f in INT8) for f in FORMS]
        for row in _of_kind(report, "digits")
    ]
    head = ["family", "variant", "layers in int8", "float32", *titles(FORMS)]
    return table(head, rows)


def int8_met(report: Report) -> str:
    """How many models meet both targets, in a sentence."""
    met = []
    for form in INT8:
        named = [r for r in _of_kind(report, "digits") if "top1" in r["forms"].get(form, {})]
        good = sum(_within(row["forms"][form], row["forms"]["float32"]) for row in named)
        met.append(f"`{TITLES.get(form, form)}` meets both in {good} of {len(named)} models")
    return f"{'; '.join(met)}."


def int8_errors(report: Report) -> str:
    """Relative errors of the outputs."""
    rows = [
        [f"`{row['model']}`"]
        + [
            f"{figures['error']:.4f}" if "error" in figures else "–"
            for figures in (row["forms"].get(form, {}) for form in FORMS)
        ]
        for row in _of_kind(report, "digits")
    ]
    return table(["relative error", *titles(FORMS)], rows)


def int8_restoration(*reports: Report) -> str:
    """PSNR by instruction set."""
    cells = []
    for report in reports:
        for row in _of_kind(report, "pictures"):
            exact = row["forms"]["float32"]["psnr"]
            figures = [f"{exact:.2f}"]
            for form in FORMS:
                found = row["forms"].get(form, {}).get("psnr")
                text = "–" if found is None else f"{found:.2f} ({_signed(found - exact, 3)})"
                missed = found is not None and form in INT8 and exact - found > PSNR_DROP
                figures.append(f"**{text}**" if missed else text)
            cells.append([report["machine"]["instruction_set"], _quantized(row), *figures])
    return table(["PSNR, dB", "layers in int8", "float32", *titles(FORMS)], cells)


def _toolkits(rows: Sequence[Row]) -> list[str]:
    found = {name for row in rows for name in row["contenders"]}
    return [name for name in TITLES if name in found and name not in (*TIMED, "bfloat16")]


def int8_predictions(report: Report) -> str:
    """Top-1 and agreement of our forms and of the toolkits."""
    rows = report["results"]
    names = [*TIMED[1:], *_toolkits(rows)]
    cells = []
    for row in rows:
        found, exact = row["contenders"], row["contenders"]["float32"]
        differences = [_difference(found.get(name), exact, False) for name in names]
        cells.append([f"`{row['model']}`", f"{exact['top1']:.2f}", *differences])
    return table(["top-1", "float32", *titles(names)], cells)


def int8_sizes(report: Report) -> str:
    """Sizes on disk, which do not depend on the setting."""
    rows = report["results"]
    names = [*TIMED[:3], *_toolkits(rows)]
    first = {row["model"]: row for row in reversed(rows)}
    cells = [
        [f"`{model}`"]
        + [
            f"{figures['bytes'] / 1e6:.1f}" if "bytes" in figures else "–"
            for figures in (first[model]["contenders"].get(name, {}) for name in names)
        ]
        for model in dict.fromkeys(row["model"] for row in rows)
    ]
    return table(["MB", *titles(names)], cells)


def failures(*reports: Report) -> str:
    """What could not be measured, and our reasons for not computing in int8."""
    lines: dict[str, None] = {}
    for row in (row for report in reports for row in report["results"]):
        for name, figures in (row.get("contenders") or row["forms"]).items():
            reason = next((figures[k] for k in ("skipped", "failed", "reason") if k in figures), "")
            if reason:
                text = " ".join(reason.split())[:200]
                lines[f"- `{row['model']}`, {TITLES.get(name, name)}: `{text}`"] = None
    return "\n".join(lines) or "- nothing"


# -- learning --------------------------------------------------------------------------------------


def learning(report: Report) -> str:
    """What every family has learnt."""
    rows = []
    for model, result in report["results"].items():
        accuracies = [row["val_top1"] for row in result["history"]]
        cells = [result["family"], f"`{model}`", f"{result['parameters'] / 1e6:.1f}"]
        cells += [f"{accuracies[0]:.1f} %", f"{max(accuracies):.2f}"]
        loss, seconds = result["history"][-1]["train_loss"], result["cpu_seconds"]
        rows.append([*cells, f"{loss:.3f}", f"{seconds:.0f}"])
    head = ["Family", "Variant", "Parameters, M", "after epoch 1", "best, %"]
    return table([*head, "training loss", "CPU seconds"], rows, 2)


def trained_with(report: Report) -> str:
    """The machines of the trainings, in a sentence."""
    others = [
        f"; `{model}` with {result['machine']}"
        for model, result in report["results"].items()
        if "machine" in result
    ]
    return f"with {report['machine']}{''.join(others)}."


def robustness(report: Report) -> str:
    """Top-1 on clean and noisy digits: mean and range over the seeds."""
    columns = list(next(iter(next(iter(report["results"].values())).values())))
    rows = []
    for kind, seeds in report["results"].items():
        cells = []
        for column in columns:
            values = [seed[column] for seed in seeds.values()]
            low, high = min(values), max(values)
            cells.append(f"{statistics.fmean(values):.1f} ({low:.1f}–{high:.1f})")
        rows.append([kind, *cells])
    return table(["", *(column.replace("_", " ") for column in columns)], rows)


# -- parity ----------------------------------------------------------------------------------------


def parity(report: Report) -> str:
    """A table for each family: figures of the originals, and the errors of ours."""
    parts = []
    for family in dict.fromkeys(family for family, _ in originals.variants()):
        names = [n for f, n in originals.variants() if f == family and n in report]
        head = ("Variant", "M params", "G MACs", "Error, output", "Error, stages", "Reported")
        lines = [f"| {' | '.join((*head, 'Weights', 'Licence'))} |"]
        lines.append("|---|" + "---:|" * 5 + "---|---|")
        lines += [_parity_row(family, name, report[name]) for name in names]
        parts += [f"## {family}", "\n".join(lines)] if names else []
    return "\n\n".join(parts)


def parity_cpus(report: Report) -> str:
    """The CPUs that made the errors."""
    return "; ".join(sorted({errors["cpu"] for errors in report.values()}))


def _parity_row(family: str, variant: str, errors: Row) -> str:
    figures = originals.reference(family, variant)
    cells = [
        f"`{variant}`",
        *(f"{figures['params'] / 1e6:.2f}", f"{figures['macs'] / 1e9:.2f}"),
        *(f"{errors[key]:.1e}" for key in ("output", "stages")),
        _reported(figures["reported"]),
        _weights(figures["weights"]),
        re.sub(r" \([^)]*\)", "", figures["licence"]),
    ]
    return "| " + " | ".join(cells) + " |"


def _reported(reported: dict[str, Any]) -> str:
    """ImageNet top-1 (fine-tuned if necessary), or that of the first medical set; else a dash."""
    if reported.get("top1") is not None:
        return f"{reported['top1']}"
    for how, figures in reported.items():
        if isinstance(figures, dict) and "top1" in figures:
            return f"{figures['top1']} ({how.replace('_', ' ')})"
    for name, accuracy in reported.get("medmnist_acc", {}).items():
        return f"{accuracy} ({name})"
    return "–"


def _weights(weights: list[dict[str, Any]]) -> str:
    """The number of download links and the first direct one."""
    links = sorted(
        (w["url"] for w in weights if w.get("url")),
        key=lambda url: not url.endswith((".pth", ".tar", ".pt")),
    )
    return f"[{len(links)}]({links[0]})" if links else "none published"


TABLES: dict[str, Callable[..., str]] = {
    function.__name__: function
    for function in (
        *(int8_accuracy, int8_met, int8_errors, int8_restoration, int8_predictions),
        *(int8_sizes, failures, learning, trained_with, robustness, parity, parity_cpus),
    )
}
