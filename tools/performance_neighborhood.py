"""Neighborhood attention on the performance page, from a report of ``benchmark_na.py``."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = ["of_neighborhood", "of_split"]

OURS = "cpu"
INTRODUCTION = (
    "The columns give the C++ kernel's time in ms, its GFLOP/s relative to a 1024³ matrix product "
    "in the same turns, its peak additional memory (results included) as a multiple of the "
    "inputs', and how many times longer the others took, as medians of the ratios over turns. A "
    "turn repeats the call and counts the second half; very slow contenders were timed once, as "
    "noted in the JSON. With bfloat16 tensors the kernel still computes in float32, while the "
    "matrix product runs in bfloat16. A dash means that the contender does not support the call "
    "(the JSON says why). An entry in GiB means that it was skipped because it needs that much "
    "memory; an entry in s, because a call would take that long, extrapolated from batch 1.\n\n"
    "`gather` copies out the window of every query (the `reference` backend), `sdpa-mask` is "
    "torch's masked attention over all pairs, `flex` is compiled flex attention, and `natten` is "
    "NATTEN 0.21's CPU implementation, which has no backward."
)
NO_GPU = (
    "Nothing here ran on a GPU. The Triton kernels are tested in Triton's interpreter and compiled "
    "ahead of time, but have not yet been compared with compiled flex attention and NATTEN's own "
    "kernels on a GPU."
)


@dataclass(frozen=True)
class Aim:
    """A target for the float32 rows of one direction selected by ``where``."""

    title: str
    backward: bool
    bound: float
    figure: Callable[[dict[str, Any]], float | None]
    where: Callable[[dict[str, Any]], bool] = lambda row: True
    unit: str = "×"
    at_most: bool = False

    def holds(self, figure: float) -> bool:
        return figure <= self.bound if self.at_most else figure >= self.bound


def over(name: str) -> Callable[[dict[str, Any]], float | None]:
    """A contender's time relative to ours, if it was measured."""
    return lambda row: row["contenders"].get(name, {}).get("times_ours")


def rate(row: dict[str, Any]) -> float:
    """GFLOP/s as a percentage of a matrix product's."""
    return 100 * row["contenders"][OURS]["fraction_of_matmul"]


def memory(row: dict[str, Any]) -> float | None:
    """Peak additional memory relative to the inputs'."""
    peak = row["contenders"][OURS]["peak_bytes"]
    return None if peak is None else peak / row["input_bytes"]


def side(length: int) -> Callable[[dict[str, Any]], bool]:
    return lambda row: list(row["size"]) == [length, length]


def large(row: dict[str, Any]) -> bool:
    return min(row["size"][-2:]) >= 28


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


def of_neighborhood(report: dict[str, Any], picture: str) -> str:
    """The section; ``picture`` is the benchmark's plot, relative to the page."""
    machine = report["machine"]
    parts = [
        "## Neighborhood attention",
        f"Measured on {machine['name']} ({machine['cpu_capability']}), {machine['threads']} "
        f"thread(s), torch {machine['torch']}. {INTRODUCTION}",
    ]
    if machine["device"] == "cpu":
        parts.append(NO_GPU)
    parts += [f"![Speed over the tiled backend]({picture})", *aims(report["results"])]
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in report["results"]:
        groups.setdefault((row["dtype"], row["batch"], row["backward"]), []).append(row)
    for (dtype, batch, backward), rows in groups.items():
        direction = "Forward and backward" if backward else "Forward"
        parts += [f"### {direction}, {dtype}, batch {batch}", table(rows)]
    return "\n\n".join(parts) + "\n"


# Its functions with the softmax between them are to be slower than ours at least this many times.
SPLIT_AIM = 5.0


def of_split(report: dict[str, Any]) -> str:
    """The section on the split functions, from a run beside a NATTEN that has them."""
    machine = report["machine"]
    lines = [
        "| Setting | | NATTEN 0.17.5, ms | split, ms | times faster (aim 5×) | fused, ms |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for row in report["results"]:
        theirs, ours, fused = (row["contenders"][n] for n in ("natten-split", "split", OURS))
        ratio = theirs["milliseconds"] / ours["milliseconds"]
        cells = [
            f"`{row['setting']}`",
            "forward and backward" if row["backward"] else "forward",
            *(f"{of['milliseconds']:.2f}" for of in (theirs, ours)),
            f"{ratio:.1f}×" if ratio >= SPLIT_AIM else f"**{ratio:.1f}×**",
            f"{fused['milliseconds']:.2f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return (
        "\n\n".join(
            [
                "## The split functions of neighborhood attention",
                f"Measured on {machine['name']}, {machine['threads']} thread(s), torch "
                f"{machine['torch']}, float32, one image of 4 heads. `na2d_qk`, a softmax and "
                "`na2d_av`, in NATTEN compiled with `-O3 -march=native` and in ours; beside them, "
                "the fused function.",
                "\n".join(lines),
            ]
        )
        + "\n"
    )


def aims(rows: list[dict[str, Any]]) -> list[str]:
    """The targets, whether they are met, and which settings miss them."""
    lines = []
    for aim in AIMS:
        found = [
            (figure, row)
            for row in rows
            if row["dtype"] == "float32" and row["backward"] == aim.backward and aim.where(row)
            if (figure := aim.figure(row)) is not None
        ]
        if not found:
            continue
        found.sort(key=lambda pair: pair[0], reverse=aim.at_most)
        missed = [shown(aim, *pair) for pair in found if not aim.holds(pair[0])]
        direction = "forward and backward" if aim.backward else "forward"
        cells = [
            aim.title,
            direction,
            "met" if not missed else f"**missed in {len(missed)} of {len(found)}**",
            ", ".join(missed) or shown(aim, *found[0]),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    if not lines:
        return []
    head = [
        "| Target (float32, all measured batches) | | | worst case, or where it is missed |",
        "| --- | --- | --- | --- |",
    ]
    return ["### Targets", "\n".join(head + lines)]


def shown(aim: Aim, figure: float, row: dict[str, Any]) -> str:
    """A figure and the setting it belongs to."""
    digits = 2 if figure < 10 else 1
    batch = "" if row["batch"] == 1 else f" batch {row['batch']}"
    return f"{figure:.{digits}f}{aim.unit} `{row['setting']}`{batch}"


def table(rows: list[dict[str, Any]]) -> str:
    """All settings of one dtype, batch and direction."""
    # On a GPU, the Triton kernels are ours.
    others = [name for name in rows[0]["contenders"] if name not in (OURS, "triton")]
    lines = [
        "| Setting | ours, ms | of matmul | memory | " + " | ".join(others) + " |",
        "| --- |" + " ---: |" * (3 + len(others)),
    ]
    for row in rows:
        held = memory(row)
        cells = [
            f"`{row['setting']}`",
            f"{row['contenders'][OURS]['milliseconds']:.2f}",
            f"{rate(row):.0f} %",
            "–" if held is None else f"{held:.1f}×",
            *(comparison(row["contenders"].get(name, {})) for name in others),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def comparison(result: dict[str, Any]) -> str:
    """A contender's time relative to ours, or the memory or time it would have needed."""
    if "times_ours" in result:
        return f"{result['times_ours']:.1f}×"
    too_much = re.search(r"(\d+)(?:\.\d+)? (GiB|s) ", result.get("skipped", ""))
    return "–" if too_much is None else f"{too_much[1]} {too_much[2]}"
