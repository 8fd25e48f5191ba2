"""Tables of the pages on operators and programs, from the reports of ``benchmark.py --op``."""

from __future__ import annotations

import pickle
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from contenders import TITLES
from tables_models import Report, Row, decimal, judged, table

OURS = "cpu"

# -- neighborhood attention ------------------------------------------------------------------------


@dataclass(frozen=True)
class Aim:
    """A target for the float32 rows of one direction selected by ``where``."""

    title: str
    backward: bool
    bound: float
    figure: Callable[[Row], float | None]
    where: Callable[[Row], bool] = lambda row: True
    unit: str = "×"
    at_most: bool = False

    def holds(self, figure: float) -> bool:
        return figure <= self.bound if self.at_most else figure >= self.bound


def over(name: str) -> Callable[[Row], float | None]:
    """A contender's time relative to ours, if it was measured."""
    return lambda row: row["contenders"].get(name, {}).get("times_ours")


def rate(row: Row) -> float:
    """GFLOP/s as a percentage of a matrix product's."""
    return 100 * float(row["contenders"][OURS]["fraction_of_matmul"])


def memory(row: Row) -> float | None:
    """Peak additional memory relative to the inputs'."""
    peak = row["contenders"][OURS]["peak_bytes"]
    return None if peak is None else peak / row["input_bytes"]


def side(length: int) -> Callable[[Row], bool]:
    return lambda row: list(row["size"]) == [length, length]


def large(row: Row) -> bool:
    return bool(min(row["size"][-2:]) >= 28)


AIMS = [
    Aim("4× `tiled` in 2-D and 3-D", False, 4, over("tiled"), lambda row: len(row["size"]) > 1),
    Aim("2× `tiled` in 1-D", False, 2, over("tiled"), lambda row: len(row["size"]) == 1),
    Aim("50× `gather`", False, 50, over("gather")),
    Aim("5× `sdpa-mask` at 28²", False, 5, over("sdpa-mask"), side(28)),
    Aim("20× `sdpa-mask` at 56²", False, 20, over("sdpa-mask"), side(56)),
    Aim("60× `natten` at batch 1", False, 60, over("natten"), lambda row: row["batch"] == 1),
    Aim("25 % of matmul at 28² and larger", False, 25, rate, large, " %"),
    Aim("50 % of matmul at 28² and larger (long-term)", False, 50, rate, large, " %"),
    Aim("2× `tiled`", True, 2, over("tiled")),
    Aim("20× `gather`", True, 20, over("gather")),
    Aim("15× `sdpa-mask` at 56²", True, 15, over("sdpa-mask"), side(56)),
    Aim("25 % of matmul at 28² and larger", True, 25, rate, large, " %"),
    Aim("at most 2× the inputs' memory at 128²", True, 2, memory, side(128), at_most=True),
]
# NATTEN's split functions with the softmax between them are to be slower than ours this many times.
SPLIT_AIM = 5.0


def neighborhood_aims(report: Report) -> str:
    """The targets, whether they are met, and which settings miss them."""
    lines = []
    for aim in AIMS:
        found = [
            (figure, row)
            for row in report["results"]
            if row["dtype"] == "float32" and row["backward"] == aim.backward and aim.where(row)
            if (figure := aim.figure(row)) is not None
        ]
        if not found:
            continue
        found.sort(key=lambda pair: pair[0], reverse=aim.at_most)
        missed = [_shown(aim, *pair) for pair in found if not aim.holds(pair[0])]
        verdict = "met" if not missed else f"**missed in {len(missed)} of {len(found)}**"
        worst = ", ".join(missed) or _shown(aim, *found[0])
        lines.append([aim.title, _direction(aim.backward), verdict, worst])
    head = ["Target (float32, all measured batches)", "", "", "worst case, or where it is missed"]
    return table(head, lines, 4)


def _direction(backward: bool) -> str:
    return "forward and backward" if backward else "forward"


def _shown(aim: Aim, figure: float, row: Row) -> str:
    digits = 2 if figure < 10 else 1
    batch = "" if row["batch"] == 1 else f" batch {row['batch']}"
    return f"{figure:.{digits}f}{aim.unit} `{row['setting']}`{batch}"


def neighborhood(report: Report) -> str:
    """A table for each dtype, batch and direction."""
    groups: dict[tuple[str, int, bool], list[Row]] = {}
    for row in report["results"]:
        groups.setdefault((row["dtype"], row["batch"], row["backward"]), []).append(row)
    parts = []
    for (dtype, batch, backward), rows in groups.items():
        # On a GPU, the Triton kernels are ours.
        others = [name for name in rows[0]["contenders"] if name not in (OURS, "triton")]
        lines = []
        for row in rows:
            held, own = memory(row), decimal(row["contenders"][OURS]["milliseconds"], 2)
            cells = [f"`{row['setting']}`", own, f"{rate(row):.0f} %"]
            cells.append("–" if held is None else f"{held:.1f}×")
            lines.append([*cells, *(_longer(row["contenders"].get(name, {})) for name in others)])
        head = ["Setting", "ours, ms", "of matmul", "memory", *others]
        parts.append(f"### {_direction(backward).capitalize()}, {dtype}, batch {batch}")
        parts.append(table(head, lines))
    return "\n\n".join(parts)


def _longer(result: dict[str, Any]) -> str:
    """A contender's time relative to ours, or the memory or time it would have needed."""
    if "times_ours" in result:
        return f"{decimal(result['times_ours'], 1)}×"
    too_much = re.search(r"(\d+)(?:\.\d+)? (GiB|s) ", result.get("skipped", ""))
    return "–" if too_much is None else f"{too_much[1]} {too_much[2]}"


def split(report: Report) -> str:
    """The split functions beside a NATTEN that has them."""
    lines = []
    for row in report["results"]:
        names = ("natten-split", "split", OURS)
        theirs, ours, fused = (row["contenders"][name]["milliseconds"] for name in names)
        ratio = f"{theirs / ours:.1f}×"
        cells = [f"`{row['setting']}`", _direction(row["backward"])]
        cells += [f"{theirs:.2f}", f"{ours:.2f}"]
        cells.append(ratio if theirs / ours >= SPLIT_AIM else f"**{ratio}**")
        lines.append([*cells, f"{fused:.2f}"])
    head = ["Setting", "", "NATTEN 0.17.5, ms", "split, ms"]
    return table([*head, f"times faster (aim {SPLIT_AIM:.0f}×)", "fused, ms"], lines, 2)


# -- scans -----------------------------------------------------------------------------------------

SCAN_AIMS = {"reference": 20.0, "fla": 1.5, "transformers": 1.5, "mambapy": 1.5}
NETWORK_AIM, BOUND_AIM = 3.0, 0.7


def scans(report: Report) -> str:
    """Gated linear attention by length."""
    names = list(dict.fromkeys(name for row in report["scans"].values() for name in row))
    rows = []
    for tokens, found in report["scans"].items():
        own = found[names[0]]["milliseconds"]
        cells = [tokens, f"{own:.3f}", f"{1e6 * own / int(tokens):.0f}"]
        rows.append([*cells, *(_scan(found, name) for name in names[1:])])
    head = ["tokens", "kernel, ms", "ns per token"]
    return table([*head, *(f"{TITLES[name]}, times slower" for name in names[1:])], rows)


def _scan(found: dict[str, Any], name: str) -> str:
    return judged(found[name]["times_longer"], SCAN_AIMS.get(name)) if name in found else "–"


def scan_networks(report: Report) -> str:
    """ViG beside a network with attention, in a sentence."""
    networks = report["networks"]
    ours, theirs = (networks[name]["milliseconds"] / 1e3 for name in ("vig_t", "deit_tiny"))
    longer = judged(networks["deit_tiny"]["times_longer"], NETWORK_AIM)
    return (
        f"An image of {networks['side']}×{networks['side']} takes {ours:.1f} s with fused `vig_t` "
        f"and {theirs:.1f} s with timm's `deit_tiny_patch16_224`: a speedup of {longer}."
    )


def selective(report: Report) -> str:
    """The selective scan by states and length."""
    others = ("reference", "chunked", "transformers", "mambapy")
    rows = []
    for row in report["scans"]:
        found, tokens = row["contenders"], row["tokens"]
        own, of_map = (found[name]["milliseconds"] for name in ("cpu", "map"))
        bound = max(row["bounds"], key=row["bounds"].__getitem__)
        reached = f"{100 * row['bounds'][bound] / own:.0f} % of {bound}"
        cells = [str(row["states"]), str(tokens), f"{own:.3f}", f"{1e6 * own / tokens:.0f}"]
        cells += [reached, *(_scan(found, name) for name in others)]
        rows.append([*cells, f"{of_map:.3f}", f"{1e6 * of_map / tokens:.0f}"])
    head = ["states", "tokens", "kernel, ms", "ns per token", f"reached (aim {BOUND_AIM:.0%})"]
    head += [f"{TITLES[name]}, times slower" for name in others]
    return table([*head, "map in four orders, ms", "ns per pixel"], rows)


def selective_rates(report: Report) -> str:
    """What the memory and the CPU can do, in a sentence."""
    rates = report["nanoseconds"]
    return (
        f"reads and writes memory at up to {1 / rates['byte']:.1f} GB/s, and numpy takes "
        f"{rates['exponential']:.2f} ns for an exponential in float32 and "
        f"{rates['logarithm']:.2f} ns for a logarithm"
    )


# -- embedding -------------------------------------------------------------------------------------

_BILLION, _IN_SHARD = 10**9, 10_000


def _part(report: Report, name: str) -> list[Row]:
    return [row for row in report["results"] if row["part"] == name]


def _medians(row: Row, *keys: str) -> list[str]:
    return [f"{statistics.median(row[key]):.1f}" for key in keys]


_SAME = {None: "–", True: "yes", False: "no"}
# Headings and cells by part.
_EMBED: dict[str, tuple[Sequence[str], Callable[[Row], Sequence[str]]]] = {
    "speed": (
        ("model", "dtype", "embed, images/s", "script, images/s", "ratio", "least cosine"),
        lambda r: (
            *(_model(r), r["dtype"], *_medians(r, "embed", "script"), f"{r['ratio']:.2f}"),
            f"{r['cosine']:.5f}" if "cosine" in r else "·",
        ),
    ),
    "decoding": (
        ("step", "ms an image", "same pixels"),
        lambda r: (r["model"], f"{r['ms']:.2f}", _SAME[r["same"]]),
    ),
    "ray": (
        ("model", "local, images/s", "Ray, images/s", "overhead"),
        lambda r: (_model(r), *_medians(r, "local", "ray"), f"{100 * r['overhead']:.1f} %"),
    ),
    "pipelines": (
        ("package, model", "embed, images/s", "the package, images/s", "ratio"),
        lambda r: (r["model"], *_medians(r, "embed", "theirs"), f"{r['ratio']:.2f}"),
    ),
}


def embed(report: Report, part: str) -> str:
    """One of the comparisons of `embed`."""
    head, cells = _EMBED[part]
    return table(head, [cells(row) for row in _part(report, part)], 1 + (part == "speed"))


def _model(row: Row) -> str:
    return f"`{row['model']}`"


def embed_task() -> str:
    """What a task of Ray is, for a billion images."""
    size = len(pickle.dumps((99_999, "shards/099999.tar")))
    return f"{size} bytes, and brings back a count: {size * _BILLION // _IN_SHARD / 1e6:.0f} MB"


def embed_plan(report: Report) -> str:
    """The resources for a billion images."""
    rows = []
    for row in _part(report, "speed"):
        hours = _BILLION / (statistics.median(row["embed"]) / row["cores"]) / 3600
        size = 2 * row["dim"] + 60
        cells = [f"`{row['model']}`", row["dtype"], f"{hours:,.0f}", f"{hours / 1000:.1f}"]
        rows.append([*cells, f"{size * _BILLION / 1e12:.2f}", f"{size * _IN_SHARD / 1e6:.1f}"])
    head = ["model", "dtype", "core hours", "hours on 1000 cores", "table, TB", "a shard, MB"]
    return table(head, rows, 2)


def embed_memory(report: Report) -> str:
    """Resident memory over many rows, in a sentence."""
    (row,) = _part(report, "memory")
    peaks = ", ".join(f"{mib} MiB after {share}" for share, mib in row["mib"].items())
    return (
        f"of one process over {row['rows']} rows ({row['model']}, JPEGs of 64×48 pixels, "
        f"{row['seconds']:.0f} s): {peaks} of them."
    )


# -- training and starting -------------------------------------------------------------------------


def training(report: Report) -> str:
    """The overhead of the training code."""
    loader, step = report["loader"], report["step"]
    aims = [part["aim"].split()[-1] for part in (loader, step)]
    rows = [
        [
            f"Loader: {loader['images']} JPEG files of 500×375 to 224×224, {loader['workers']} "
            "loader process(es), without a model",
            f"{loader['ours_images_per_second']:.0f} images/s",
            f"timm's loader: {loader['timm_images_per_second']:.0f} images/s",
            *(f"{loader['ratio']:.3f}", f"≥ {aims[0]}"),
        ],
        [
            f"Training step of `{step['model']}`, batch {step['batch_size']} at "
            f"{step['img_size']}×{step['img_size']}",
            f"{step['ours_ms']:.1f} ms",
            f"a bare PyTorch loop: {step['bare_ms']:.1f} ms",
            *(f"{step['ratio']:.3f}", f"≤ {aims[1]}"),
        ],
    ]
    return table(["", "ours", "compared with", "ratio", "target"], rows)


# What is installed, as on the page.
WAYS = {
    "wheel": "a wheel",
    "source": "source",
    "no-compiler": "source, no compiler",
}


def cold_start(report: Report) -> str:
    """The time to the first image."""
    order = list(WAYS)
    rows = [
        [WAYS[row["way"]], f"`{row['model']}`", f"{row['plain']['seconds']:.2f}"]
        + [f"{row['fused'][key]:.2f}" for key in ("seconds", "cpu_seconds")]
        for row in sorted(report["results"], key=lambda row: order.index(row["way"]))
    ]
    head = ["installed from", "model", "plain, s", "fused, s", "fused, s of CPU time"]
    return table(head, rows, 2)


def guards(report: Report) -> str:
    """What it costs to see whether something has changed."""
    rows = [
        [row["python"], f"`{row['model']}`", f"{row['call_ms']:.2f}", f"{row['guards_us']:.0f}"]
        + [f"{row['guards_us'] / row['call_ms'] / 10:.1f} %"]
        for row in report["results"]
    ]
    return table(["Python", "model", "a call, ms", "of which checks, µs", "share"], rows, 2)


TABLES: dict[str, Callable[..., str]] = {
    function.__name__: function
    for function in (
        *(neighborhood_aims, neighborhood, split, scans, scan_networks, selective, selective_rates),
        *(embed, embed_task, embed_plan, embed_memory, training, cold_start, guards),
    )
}
