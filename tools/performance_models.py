"""The models' section of the performance page, from a report of ``tools/benchmark.py``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["judged", "of_compiled", "of_lesser", "of_models", "of_runtimes", "table"]

FUSED, LOW, LAST = "fused", "fused+bfloat16", "channels_last"
# Target speedup of the fused model over the original, for batch 1 and batch 8.
AIMS = {
    "efficientvit_m5": {FUSED: (1.55, 1.75), LOW: (2.5, 4.4)},
    "shvit_s4": {FUSED: (1.45, 1.65), LOW: (2.9, 5.4)},
    "inception_next_tiny": {FUSED: (1.3, 1.45), LOW: (3.6, 6.2)},
    "unireplknet_a": {FUSED: (2.3, 2.3), LOW: (3.0, 3.6)},
    "unireplknet_t": {FUSED: (1.6, 1.8), LOW: (3.0, 4.4)},
    "van_b0": {FUSED: (1.8, 1.8), LOW: (2.0, 2.0)},
    "biformer_tiny": {FUSED: (1.6, 1.6), LOW: (2.0, 2.0)},
    "litv2_s": {FUSED: (1.6, 1.6), LOW: (2.0, 2.0)},
    "favit_b0": {FUSED: (1.5, 1.5), LOW: (2.0, 2.0)},
    "ravlt_t": {FUSED: (1.6, 1.6), LOW: (2.0, 2.0)},
    "medvitv2_tiny": {FUSED: (2.0, 2.0), LOW: (2.0, 2.0)},
    "hat_s_x2": {FUSED: (1.6, 1.6), LOW: (2.0, 2.0)},
    **{
        name: {FUSED: (2.5, 2.5), LOW: (4.0, 4.0)}
        for name in ("nat_mini", "dinat_mini", "dinat_s_tiny", "nat_isotropic_small")
    },
    **{f"vig_{size}": {FUSED: (2.0, 2.0)} for size in ("t", "h_t")},
    **{f"proxyless_{kind}": {FUSED: (2.5, 2.5)} for kind in ("cpu", "gpu", "mobile", "mobile_14")},
    **{f"vrwkv{version}_t": {FUSED: (2.0, 2.0)} for version in ("", "6")},
}
AIM_BATCHES = (1, 8)
ORIGINAL, OURS = "original", "eager"
# MedViTV2's original with the kernels used by its authors.
NATTEN, NATTEN_AIM = "natten_0_17", 10.0
LABELS = {
    LAST: "channels last",
    LOW: "fused, bf16",
    NATTEN: "original on NATTEN 0.17.3",
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
    "openvino_bf16": "OpenVINO, bf16",
}
# Fused models are compared to runtimes that compute in the same dtype.
RUNTIMES = {FUSED: ("onnxruntime", "openvino"), LOW: ("openvino_bf16",)}
# Interpretation of the profile.
READING = {
    "EfficientViT, SHViT": (
        "Small matrix products of a few hundred rows and, at one image, call overhead, which "
        "replay removes. Linear layers with packed weights gain the most, followed by the "
        "single-pass stem and our depthwise convolution kernel."
    ),
    "InceptionNeXt": (
        "Linear layers, which run at the rate of a large matrix product and dominate the remaining "
        "time. In bfloat16 the gain is that of the matrix products."
    ),
    "UniRepLKNet": (
        "Large depthwise convolutions, whose branches are merged and run by our kernel. The rest "
        "of a block (squeeze and excitation, MLP with global response norm, shortcut) is one call."
    ),
    "VAN": (
        "Feed-forwards, which run in a single pass including their depthwise convolution when "
        "fused. Depthwise convolutions (those, the 5×5 and the dilated 7×7) take a third of the "
        "plain model's time. Only the norms between stages remain."
    ),
    "BiFormer": (
        "Linear layers, then attention to the selected regions, which reads keys and values in "
        "place instead of gathering them."
    ),
    "LITv2": (
        "Feed-forwards dominate; a single pass from norm to shortcut keeps the hidden map in "
        "cache. Deformable downsampling is one kernel from sampling to activation."
    ),
    "FaViT": (
        "Feed-forwards and attention of narrow heads to 49 keys; the rest is many small calls. "
        "Window index tables are cached."
    ),
    "RAVLT": (
        "Feed-forwards, projections and the stem's convolutions. Attention, linear or softmax, "
        "runs in one pass from the projection to the gate."
    ),
    "MedViTV2": (
        "Linear layers of the KANs, then convolutions. Neighborhood attention, which dominates "
        "the original, is a small part."
    ),
    "HAT": (
        "Window attention, then matrix products. The fused model reads and writes windows in "
        "place; plain layers copy them out of the map and back."
    ),
}
INTRODUCTION = (
    "`fused` is `model.fuse()`; `fused, bf16` is `model.fuse(dtype=torch.bfloat16)`, compared with "
    "the others in float32. `original` is the authors' code, `timm` and `birder` (0.8.4) are those "
    "libraries' models. MedViTV2's `original`, where listed, gathers the windows of its "
    "neighborhood attention. {natten}"
    "`torch.compile` compiles the plain layers of a fused model and bypasses its faster kernels, "
    "so use one or the other. "
    "A dash means that there is no such model, that it was not measured, or that it failed; the "
    "JSON says which."
)
LAST_FORMAT = (
    "`channels last` is our plain model with weights in that memory format, as `train_cls.py` "
    "uses on a CPU."
)
# Reports of the same machine restricted to a lesser instruction set → title, environment.
LESSER = {
    "avx512": (
        "AVX-512 without bfloat16 (Skylake to Ice Lake)",
        "VISION_BACKBONES_NATIVE_ISA=avx512 ONEDNN_MAX_CPU_ISA=AVX512_CORE_VNNI",
    ),
    "avx2": (
        "AVX2 (most desktop CPUs)",
        "VISION_BACKBONES_NATIVE_ISA=avx2 ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 "
        "MKL_ENABLE_INSTRUCTIONS=AVX2",
    ),
}
LESSER_INTRODUCTION = (
    "Measured on the same machine with oneDNN, MKL, torch and our kernels restricted to fewer "
    "instructions. The ratios are indicative of CPUs with these instruction sets; the times are "
    "not. Without bfloat16 arithmetic, torch is slower in bfloat16 than in float32, on AVX2 many "
    "times slower; fused layers convert to float32 on the fly and read half as many bytes."
)
ON_NATTEN = (
    "`original on NATTEN 0.17.3` is its code with NATTEN's CPU kernels, which `pip` compiles "
    "without optimisation. "
)


def of_models(report: dict[str, Any], picture: str, has_aims: bool = True) -> str:
    """The section; ``picture`` is the benchmark's plot, relative to the page.

    ``has_aims``: whether to compare ratios with :data:`AIMS`.
    """
    machine = report["machine"]
    parts = [
        "## Models",
        f"Measured on {machine['name']} ({machine['cpu_capability']}), torch {machine['torch']}.",
        INTRODUCTION.format(natten=ON_NATTEN if NATTEN in _names(report["results"]) else ""),
        f"![Speed over eager]({picture})",
    ]
    forward = [row for row in report["results"] if row["direction"] == "forward"]
    usual = [row for row in forward if row["size"] == _usual_size(row)]
    groups: dict[tuple[int, int, str], list[dict[str, Any]]] = {}
    for row in usual:
        groups.setdefault((row["threads"], row["batch"], row["dtype"]), []).append(row)
    for (threads, batch, dtype), rows in sorted(groups.items()):
        title = f"### Batch {batch}, {threads} thread{'s' * (threads > 1)}, {dtype}"
        parts += [title, *_times(rows, batch, AIMS if has_aims else {})]
    training = [row for row in report["results"] if row["direction"] == "train"]
    if training:
        parts += ["### Training step", _training(training), _orders(training)]
        if LAST in _names(training):
            parts.append(LAST_FORMAT)
    parts += [*_growth(forward), *_shares(usual)]
    return "\n\n".join(parts) + "\n"


def of_compiled(report: dict[str, Any]) -> str:
    """Comparison with ``torch.compile``, measured separately: many contenders slow each other."""
    names = [OURS, "compile", FUSED, "fused+compile"]
    rows = [
        [f"`{row['model']}`", *(_ms(row, name) for name in names)]
        + [judged(_ratio(row, FUSED, OURS), None), judged(_ratio(row, "compile", OURS), None)]
        for row in report["results"]
    ]
    head = ["ms", *names, "fused, times faster than eager", "compile, times faster than eager"]
    return (
        "\n\n".join(
            [
                "## Compared with torch.compile",
                "One image, one thread, float32. Measured with older kernels than above and one "
                "call per turn, so with colder caches.",
                table(head, rows),
            ]
        )
        + "\n"
    )


def of_timm(report: dict[str, Any]) -> str:
    """Models of timm compared with their plain forms and with other runtimes."""
    plain = [OURS, LAST]
    return of_runtimes(
        report,
        "## Models of timm",
        "Networks that this library does not contain, under `timm/` and their names "
        "([guide](guides/any_model.md)). ONNX Runtime {onnxruntime} and OpenVINO {openvino} run "
        "the file that `export` writes.",
        plain,
    )


_OF_OURS = (
    "ONNX Runtime {onnxruntime} and OpenVINO {openvino} run the file written by "
    "[`export --fused`](guides/export.md), with norms and branches folded."
)


def of_runtimes(
    report: dict[str, Any],
    heading: str = "## Compared with ONNX Runtime and OpenVINO",
    introduction: str = _OF_OURS,
    plain: Sequence[str] = (),
) -> str:
    """Comparison with other runtimes, from its own report.

    Args:
        plain: contenders that are listed without a ratio.
    """
    versions = {k: v for row in report["results"] for k, v in row["versions"].items()}
    pairs = [(ours, theirs) for ours, others in RUNTIMES.items() for theirs in others]
    names = [*plain, FUSED, *RUNTIMES[FUSED], LOW, *RUNTIMES[LOW]]
    rows = [
        [f"`{row['model']}`", str(row["batch"]), str(row["threads"])]
        + [_ms(row, name) for name in names]
        + [judged(_ratio(row, ours, theirs), 1.0) for ours, theirs in pairs]
        for row in report["results"]
    ]
    labels = [LABELS.get(name, name) for name in names]
    ratios = [f"{LABELS.get(ours, ours)}, than {LABELS[theirs]}" for ours, theirs in pairs]
    return (
        "\n\n".join(
            [
                heading,
                f"{introduction.format(**versions)} The last columns give the fused model's "
                "speedup; the target is to be no slower. A dash means that the runtime rejects the "
                "file; the JSON says why.",
                table(["ms", "batch", "threads", *labels, *ratios], rows),
                _orders(report["results"]),
            ]
        )
        + "\n"
    )


def of_lesser(reports: Mapping[str, dict[str, Any]]) -> str:
    """The same CPU with fewer instructions, from a report for each of :data:`LESSER`."""
    parts = ["## Restricted to fewer instructions", LESSER_INTRODUCTION]
    for name, report in reports.items():
        title, environment = LESSER[name]
        parts += [f"### {title}", f"One thread, with `{environment}`."]
        names = [ORIGINAL, OURS, FUSED, LOW]
        rows = []
        for row in report["results"]:
            base = ORIGINAL if _ratio(row, FUSED, ORIGINAL) is not None else OURS
            ratios = [judged(_ratio(row, name, base), None) for name in (FUSED, LOW)]
            times = [_ms(row, name) for name in names]
            rows.append([f"`{row['model']}`", str(row["batch"]), *times, base, *ratios])
        labels = [LABELS.get(name, name) for name in names]
        head = ["ms", "batch", *labels, "times faster than", FUSED, LABELS[LOW]]
        parts += [table(head, rows), _orders(report["results"])]
    return "\n\n".join(parts) + "\n"


def _usual_size(row: dict[str, Any]) -> int:
    return 64 if row["model"].startswith("hat") else 224


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _names(rows: list[dict[str, Any]]) -> list[str]:
    found = dict.fromkeys(name for row in rows for name in row["contenders"])
    order = [ORIGINAL, "timm", "birder", OURS, LAST, "compile", FUSED, "fused+compile", LOW]
    return [*(name for name in order if name in found), *(n for n in found if n not in order)]


def _ms(row: dict[str, Any], name: str) -> str:
    time = row["contenders"].get(name, {}).get("milliseconds")
    return "–" if time is None else f"{time:.1f}"


def _ratio(row: dict[str, Any], name: str, other: str) -> float | None:
    return row["contenders"].get(name, {}).get("speedup_over", {}).get(other)


def judged(ratio: float | None, aim: float | None) -> str:
    """A ratio, its target, and whether it was missed."""
    if ratio is None or aim is None:
        return "–" if ratio is None else f"{ratio:.2f}×"
    missed = round(ratio, 2) < aim
    return f"**{ratio:.2f}× (missed {aim:g})**" if missed else f"{ratio:.2f}× ({aim:g})"


def _times(rows: list[dict[str, Any]], batch: int, all_aims: Mapping[str, Any]) -> list[str]:
    """Milliseconds of all contenders, ratios with their targets, and the fused model's figures."""
    names = _names(rows)
    times = table(
        ["ms", *(LABELS.get(name, name) for name in names)],
        [[f"`{row['model']}`", *(_ms(row, name) for name in names)] for row in rows],
    )
    place = AIM_BATCHES.index(batch) if batch in AIM_BATCHES else None
    comparisons = []
    for row in rows:
        aims = all_aims.get(row["model"], {})
        base = ORIGINAL if _ratio(row, FUSED, ORIGINAL) is not None else OURS
        cells = [f"`{row['model']}`", base]
        for name in (FUSED, LOW):
            aim = aims[name][place] if place is not None and name in aims else None
            cells.append(judged(_ratio(row, name, base), aim))
        ahead = 1.0 if all_aims else None
        cells += [judged(_ratio(row, FUSED, peer), ahead) for peer in ("timm", "birder")]
        fused = row["contenders"].get(FUSED, {})
        if "milliseconds" in fused:
            cells += [f"{fused['p90']:.1f}", f"{fused['images_per_second']:.1f}"]
            cells.append(f"{row['macs'] / 1e9:.2f}")
            cells.append(f"{fused['gflops']:.0f} ({100 * fused['fraction_of_matmul']:.0f} %)")
            peak = fused["peak_bytes"]
            cells.append("–" if peak is None else str(peak >> 20))
        else:
            cells += ["–"] * 5
        comparisons.append(cells)
        over_natten = [_ratio(row, name, NATTEN) for name in (FUSED, LOW)]
        if over_natten[0] is not None:
            natten_aim = NATTEN_AIM if all_aims else None
            ratios = [judged(ratio, natten_aim) for ratio in over_natten]
            comparisons.append([cells[0], LABELS[NATTEN], *ratios, *["–"] * 7])
    aim = " (aim)" if all_aims else ""
    head = ["times faster", "than", f"fused{aim}", f"fused, bf16{aim}", "than timm", "than birder"]
    head += ["p90, ms", "images/s", "G MACs", "GFLOP/s (of matmul)", "memory, MiB"]
    remark = (
        "Ratios are medians over turns. A turn repeats the call and counts the second half, since "
        "the first calls run with caches filled by another contender. If there is no original, "
        "ratios are relative to our plain model. The last five columns are for the fused model in "
        "float32; `of matmul` is its GFLOP/s relative to a 1024³ matrix product in the same turns. "
        + _orders(rows)
    )
    return [times, remark, table(head, comparisons)]


def _training(rows: list[dict[str, Any]]) -> str:
    names = _names(rows)
    ours = [name for name in (OURS, LAST) if name in names]
    labels = [LABELS.get(name, name) for name in names]
    return table(
        ["ms", "batch", "threads", *labels]
        + [f"{LABELS.get(name, name)}, times faster than the original" for name in ours],
        [
            [f"`{row['model']}`", str(row["batch"]), str(row["threads"])]
            + [_ms(row, name) for name in names]
            + [judged(_ratio(row, name, ORIGINAL), 1.0) for name in ours]
            for row in rows
        ],
    )


def _orders(rows: list[dict[str, Any]]) -> str:
    """The order in which the contenders were created."""
    if all(row.get("orders") == 2 for row in rows):
        return (
            "For half of the turns, the contenders are created again in reverse order, because the "
            "memory of models created later is up to 3 % faster."
        )
    return (
        "Where the JSON lacks `orders: 2`, our models were created before the others, which costs "
        "them up to 3 %."
    )


def _growth(rows: list[dict[str, Any]]) -> list[str]:
    """The fused model's time at several sizes, one image on one thread."""
    models: dict[str, dict[int, dict[str, Any]]] = {}
    for row in rows:
        if (row["batch"], row["threads"], row["dtype"]) == (1, 1, "float32"):
            models.setdefault(row["model"], {})[row["size"]] = row
    several = {name: sizes for name, sizes in models.items() if len(sizes) > 1}
    if not several:
        return []
    sizes = sorted({size for of_model in several.values() for size in of_model})
    small, large = sizes[0], sizes[-1]
    lines = []
    for name, of_model in several.items():
        cells = [_ms(of_model[size], FUSED) if size in of_model else "–" for size in sizes]
        ends = of_model.get(small), of_model.get(large)
        lines.append([f"`{name}`", *cells, *_grown(*ends)])
    return [
        "### Growth with resolution",
        "Time of the fused model in ms by side length of the image (one image, one thread, "
        f"float32). The largest size has {(large / small) ** 2:.1f} times as many pixels as the "
        "smallest. Multiply-adds grow faster than the pixels where the cost of attention does.",
        table(["ms", *map(str, sizes), "time grows", "multiply-adds grow"], lines),
    ]


def _grown(small: dict[str, Any] | None, large: dict[str, Any] | None) -> tuple[str, str]:
    """Growth factors of the time and of the multiply-adds from one size to another."""
    if small is None or large is None:
        return "–", "–"
    before, after = (row["contenders"][FUSED]["milliseconds"] for row in (small, large))
    return f"{after / before:.1f}×", f"{large['macs'] / small['macs']:.1f}×"


def _shares(rows: list[dict[str, Any]]) -> list[str]:
    """Where one image's time goes, plain and fused."""
    kinds: list[str] = []
    lines = []
    for row in rows:
        if (row["batch"], row["threads"], row["dtype"]) != (1, 1, "float32"):
            continue
        for name in (OURS, FUSED):
            shares = row["contenders"].get(name, {}).get("time_by_kind")
            if shares:
                kinds = list(shares)
                cells = [f"{100 * share:.0f} %" for share in shares.values()]
                lines.append([f"`{row['model']}`, {name}", *cells])
    if not lines:
        return []
    return [
        "### Where the time goes",
        "Shares of one image's time on one thread according to torch's profiler, plain and fused. "
        "1×1 convolutions and single-pass feed-forwards count as matrix products; time outside of "
        "operators is Python and the profiler itself. Under the profiler, a fused model runs "
        "eagerly; otherwise its calls are replayed, which removes most of the last column.",
        table(["share of time", *kinds], lines),
        "\n".join(f"- **{family}**: {said}" for family, said in READING.items()),
    ]
