"""Tables of the pages on models: speed, int8 and learning, from ``benchmark`` and ``accuracy.py``.

A function of :data:`TABLES` takes reports and gives Markdown, see ``build_pages.py``.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from contenders import TITLES

from backbones.common.figures import GRID, INK, new_figure, save_figure, style_axis

Report = dict[str, Any]
Row = dict[str, Any]

FUSED, LOW, LAST, OURS, ORIGINAL = "fused", "fused+bfloat16", "channels_last", "eager", "original"
# Target speedup of the fused model over the original, for batch 1 and batch 8.
AIMS = {
    "efficientvit_m5": {FUSED: (1.55, 1.75), LOW: (2.5, 4.4)},
    "shvit_s4": {FUSED: (1.45, 1.65), LOW: (2.9, 5.4)},
    "inception_next_tiny": {FUSED: (1.3, 1.45), LOW: (3.6, 6.2)},
    "unireplknet_a": {FUSED: (2.3, 2.3), LOW: (3.0, 3.6)},
    "unireplknet_t": {FUSED: (1.6, 1.8), LOW: (3.0, 4.4)},
}
for _fused, _low, _names in (
    (1.8, 2.0, "van_b0"),
    (1.6, 2.0, "biformer_tiny litv2_s ravlt_t hat_s_x2"),
    (1.5, 2.0, "favit_b0"),
    (2.0, 2.0, "medvitv2_tiny"),
    (2.5, 4.0, "nat_mini dinat_mini dinat_s_tiny nat_isotropic_small"),
    (2.0, None, "vig_t vig_h_t vrwkv_t vrwkv6_t"),
    (2.5, None, "proxyless_cpu proxyless_gpu proxyless_mobile proxyless_mobile_14"),
):
    _aims = {FUSED: (_fused, _fused)} | ({} if _low is None else {LOW: (_low, _low)})
    AIMS |= dict.fromkeys(_names.split(), _aims)
AIM_BATCHES = (1, 8)
NATTEN, NATTEN_AIM = "natten_0_17", 10.0
# Smallest allowed speed of a fused model relative to its plain form. The gap to 1 is the difference
# between two measurements of the same code.
FLOOR = 0.97


# -- shared by all tables --------------------------------------------------------------------------


def table(head: Sequence[str], rows: Sequence[Sequence[str]], text_columns: int = 1) -> str:
    """A Markdown table; numbers stand right, from the column ``text_columns`` on."""
    rules = ["---" if place < text_columns else "---:" for place in range(len(head))]
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, rules, *rows))


def decimal(value: float, places: int) -> str:
    """At most ``places`` decimals, of the four digits that are measured."""
    return f"{value:.{max(0, min(places, 4 - len(str(int(abs(value))))))}f}"


def judged(ratio: float | None, aim: float | None) -> str:
    """A ratio, its target, and whether it was missed."""
    if ratio is None:
        return "–"
    shown = f"{decimal(ratio, 2)}×"
    if aim is None:
        return shown
    return f"**{shown} (missed {aim:g})**" if round(ratio, 2) < aim else f"{shown} ({aim:g})"


def machine(report: Report) -> str:
    """What a report was measured on."""
    there = report["machine"]
    kind = there.get("instruction_set") or there["cpu_capability"]
    restricted = there.get("restricted")
    kind = f"restricted to {restricted}" if restricted else kind
    return f"{there['name']} ({kind}), torch {there['torch']}"


def torch_version(report: Report) -> str:
    """The version of torch that a report was measured with."""
    return str(report["machine"]["torch"])


def version(report: Report, package: str) -> str:
    """That of a package which a report was measured with."""
    (found,) = {row["versions"][package] for row in report["results"] if package in row["versions"]}
    return str(found)


def _name(row: Row) -> str:
    return f"`{row['model']}`"


def _ms(row: Row, name: str) -> str:
    time = row["contenders"].get(name, {}).get("milliseconds")
    return "–" if time is None else decimal(time, 1)


def _ratio(row: Row, name: str, other: str) -> float | None:
    found: float | None = row["contenders"].get(name, {}).get("speedup_over", {}).get(other)
    return found


def _base(row: Row) -> str:
    return ORIGINAL if _ratio(row, FUSED, ORIGINAL) is not None else OURS


def _names(rows: Sequence[Row]) -> list[str]:
    found = dict.fromkeys(name for row in rows for name in row["contenders"])
    order = [ORIGINAL, "timm", "birder", OURS, LAST, "compile", FUSED, "fused+compile", LOW]
    return [*(name for name in order if name in found), *(n for n in found if n not in order)]


def titles(names: Sequence[str]) -> list[str]:
    return [TITLES.get(name, name) for name in names]


def plural(count: int) -> str:
    return f"{count} thread{'s' * (count > 1)}"


# -- models ----------------------------------------------------------------------------------------


def _has_usual_size(row: Row) -> bool:
    return bool(row["size"] == (64 if row["model"].startswith("hat") else 224))


def aims(report: Report) -> str:
    """The fused model's speed over the original or, without one, over plain, and the targets."""
    rows = {}  # by setting; the newest counts
    for row in sorted(report["results"], key=lambda row: row.get("date", "")):
        known = AIMS.get(row["model"])
        is_usual = row["direction"] == "forward" and _has_usual_size(row)
        if known is None or not is_usual or row["batch"] not in AIM_BATCHES:
            continue
        place, base = AIM_BATCHES.index(row["batch"]), _base(row)
        cells = [_name(row), str(row["batch"]), str(row["threads"]), base]
        for name in (FUSED, LOW):
            aim = known[name][place] if name in known else None
            cells.append(judged(_ratio(row, name, base), aim))
        fused = row["contenders"].get(FUSED, {})
        reached = fused.get("fraction_of_matmul")
        share = "–" if reached is None else f"{fused['gflops']:.0f} ({100 * reached:.0f} %)"
        rows[tuple(cells[:4])] = [*cells, share]
    head = ["model", "images", "threads", "over", "float32 (target)", "bfloat16 (target)"]
    return table([*head, "GFLOP/s (of matmul)"], sorted(rows.values()))


def training_steps(report: Report) -> str:
    """Steps of plain gradient descent."""
    rows = [row for row in report["results"] if row["direction"] == "train"]
    names = _names(rows)
    ours = [name for name in (OURS, LAST) if name in names]
    head = ["ms", "batch", "threads", *titles(names)]
    head += [f"{title}, times faster than the original" for title in titles(ours)]
    return table(
        head,
        [
            [_name(row), str(row["batch"]), str(row["threads"]), *(_ms(row, n) for n in names)]
            + [judged(_ratio(row, name, ORIGINAL), 1.0) for name in ours]
            for row in rows
        ],
    )


def growth(report: Report) -> str:
    """The fused model's time at several sizes, one image on one thread."""
    models: dict[str, dict[int, Row]] = {}
    for row in _usual(report):
        models.setdefault(_name(row), {})[row["size"]] = row
    several = {name: sizes for name, sizes in models.items() if len(sizes) > 1}
    sizes = sorted({size for of_model in several.values() for size in of_model})
    lines = []
    for name, of_model in several.items():
        grown = ["–", "–"]
        if sizes[0] in of_model and sizes[-1] in of_model:
            small, large = of_model[sizes[0]], of_model[sizes[-1]]
            before, after = (r["contenders"][FUSED]["milliseconds"] for r in (small, large))
            grown = [f"{after / before:.1f}×", f"{large['macs'] / small['macs']:.1f}×"]
        cells = [_ms(of_model[size], FUSED) if size in of_model else "–" for size in sizes]
        lines.append([name, *cells, *grown])
    return table(["ms", *map(str, sizes), "time grows", "multiply-adds grow"], lines)


def _usual(report: Report) -> list[Row]:
    keys = ("batch", "threads", "dtype", "direction")
    wanted = [1, 1, "float32", "forward"]
    return [row for row in report["results"] if [row[key] for key in keys] == wanted]


def shares(report: Report) -> str:
    """Where one image's time goes, plain and fused."""
    found = [
        (f"{_name(row)}, {name}", row["contenders"][name]["time_by_kind"])
        for row in filter(_has_usual_size, _usual(report))
        for name in (OURS, FUSED)
        if "time_by_kind" in row["contenders"].get(name, {})
    ]
    lines = [[name, *(f"{100 * s:.0f} %" for s in of_row.values())] for name, of_row in found]
    return table(["share of time", *found[0][1]], lines)


# -- comparisons -----------------------------------------------------------------------------------


def natten(*reports: Report) -> str:
    """Beside the kernels that NAT was published with: without and, second, with optimisation."""
    rows = []
    for report, options in zip(reports, ("–", "`-O3 -march=native`"), strict=False):
        for row in report["results"]:
            times = [_ms(row, name) for name in (FUSED, OURS, NATTEN)]
            ratio = judged(_ratio(row, FUSED, NATTEN), NATTEN_AIM)
            rows.append([_name(row), str(row["batch"]), options, *times, ratio])
    title = TITLES[NATTEN].removeprefix("original ")
    return table(
        ["ms", "batch", "options", FUSED, "plain", title, "fused, times faster (aim)"], rows
    )


def releases(before: Report, now: Report) -> str:
    """How many times faster than plain, in an earlier release and now; one image, one thread."""
    current = {(row["model"], row["size"]): row for row in _usual(now)}
    lines = []
    for row in before["results"]:
        new = current[row["model"], row["size"]]
        if decimal(new["contenders"][FUSED]["milliseconds"], 2) == decimal(row["milliseconds"], 2):
            continue  # not measured since
        cells = [_name(row)]
        for name in (FUSED, LOW):
            ratios = (row["speedup_over_eager"][name], _ratio(new, name, OURS))
            cells += [judged(ratio, None) for ratio in ratios]
        lines.append(cells)
    head = [
        before["machine"]["name"],
        *(f"{kind}, {v}" for kind in ("float32", "bfloat16") for v in (before["version"], "now")),
    ]
    return table(head, lines)


def bounds(report: Report) -> str:
    """The speedup over plain that a fused model would have with all products at full rate."""
    rows = []
    for row in report["results"]:
        plain, fused = (row["contenders"].get(name, {}) for name in (OURS, FUSED))
        if "gflops" not in plain or "gflops" not in fused or row["threads"] > 1:
            continue
        peak = row["matmul_gflops"][row["dtype"]]
        rates = [f"{rate:.0f}" for rate in (plain["gflops"], fused["gflops"], peak)]
        reached = [f"{peak / plain['gflops']:.2f}×", f"{fused['speedup_over'][OURS]:.2f}×"]
        rows.append([_name(row), str(row["batch"]), *rates, *reached])
    head = ["GFLOP/s", "batch", "plain", "fused", "1024³ product", "at most", "reached"]
    return table(head, rows)


# -- never slower than plain -----------------------------------------------------------------------


def _over_plain(row: Row) -> float | None:
    """The fused model's speed relative to the faster plain form."""
    return min(filter(None, (_ratio(row, FUSED, name) for name in (OURS, LAST))), default=None)


def floors(*reports: Report) -> str:
    """A line for each environment: how many settings there are, the slowest, and the misses."""
    rows = []
    for report in reports:
        found = {
            f"`{row['model']}`, {row['batch']} images, {plural(row['threads'])}": ratio
            for row in report["results"]
            if (ratio := _over_plain(row)) is not None
        }
        slowest = min(found, key=found.__getitem__)
        below = [sum(ratio < limit for ratio in found.values()) for limit in (1, FLOOR)]
        cells = [str(len(found)), *map(str, below), f"{found[slowest]:.3f}× ({slowest})"]
        median = f"{statistics.median(found.values()):.2f}×"
        rows.append([report["machine"]["restricted"], *cells, median])
    head = ["kernels", "settings", "below 1", f"below {FLOOR}", "slowest", "median"]
    return table(head, rows)


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


def draw_learning(report: Report, path: Path) -> None:
    """A small plot of the accuracy for each family, with the others in grey."""
    curves = {
        model: [row["val_top1"] for row in result["history"]]
        for model, result in report["results"].items()
    }
    columns = min(5, len(curves))
    rows = -(-len(curves) // columns)
    figure = new_figure(2.35 * columns + 0.5, 2.2 * rows + 0.7)
    axes = np.atleast_1d(figure.subplots(rows, columns, sharex=True, sharey=True)).ravel()
    for number, axis in enumerate(axes):
        if number >= len(curves):
            axis.set_axis_off()
            continue
        model = list(curves)[number]
        for values in curves.values():
            axis.plot(range(1, len(values) + 1), values, color=GRID, linewidth=1.2)
        values = curves[model]
        axis.plot(range(1, len(values) + 1), values, color="#1f5fbf", linewidth=2.2, marker="o")
        style_axis(axis, "validation accuracy, %" if number % columns == 0 else "")
        if number < len(curves) - columns:
            axis.set_xlabel("")
        else:  # the lowest of its column, which may not be in the last row
            axis.tick_params(labelbottom=True)
        axis.set_ylim(0, 104)
        axis.set_title(model, fontsize=11, color=INK, loc="left", fontweight="bold")
        under = {"textcoords": "offset points", "ha": "right", "fontsize": 10, "color": INK}
        axis.annotate(f"{values[-1]:.1f} %", (len(values), values[-1]), (0, -16), **under)
    figure.tight_layout()
    save_figure(figure, path)


def trained_with(report: Report) -> str:
    """The machines of the trainings, in a sentence."""
    others = [
        f"; `{model}` with {result['machine']}"
        for model, result in report["results"].items()
        if "machine" in result
    ]
    return f"with {report['machine']}{''.join(others)}."


TABLES: dict[str, Callable[..., str]] = {
    "machine": machine,
    "torch": torch_version,
    "version": version,
    **{
        function.__name__: function
        for function in (
            *(aims, training_steps, growth, shares, natten, releases, bounds, floors),
            *(int8_accuracy, int8_met, int8_errors, int8_restoration, int8_predictions),
            *(int8_sizes, failures, learning, trained_with),
        )
    },
}
