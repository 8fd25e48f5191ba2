"""Benchmark neighborhood attention: every backend, compared with alternatives in torch.

Neighborhood attention: https://arxiv.org/abs/2204.07143. All contenders of a setting are measured
alternately in one process, so that other load affects them equally; compare the ratios, which are
taken within a turn. A turn repeats the call for ``--turn-ms`` and counts the second half, since the
first calls run with caches filled by another contender, while in a model the inputs have just been
computed. A contender whose calls take longer than ``--seconds`` is timed once.

    python tools/benchmark_na.py --threads 1 --output runs/benchmark_na
    python tools/benchmark_na.py --device cuda --dtype bfloat16 --settings 56x56-k7-d64

Writes ``<output>.json`` after every row and ``<output>.png`` at the end. A contender that does not
support a setting, would need more than ``--max-gib`` of memory or, extrapolated from a smaller
batch, more than ``--max-seconds`` per call, is listed with the reason instead of a time.

The full sweep takes long. Runs with the same ``--output`` extend the same file, so it can be
measured in parts (``--settings``); a repeated row replaces the old one, and ``--resume`` measures
only missing rows:

    python tools/benchmark_na.py --threads 1 --settings 56x56-k7-d32 28x28-k7-d32
    python tools/benchmark_na.py --threads 1 --resume
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import logging
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from measuring import PeakMemory, load_report, machine, steady, stopwatch, write
from na_contenders import (
    CONTENDERS,
    NUM_HEADS,
    SETTINGS,
    Attention,
    CannotRunError,
    Setting,
    contender,
    needed_gib,
)
from na_picture import BASELINE, draw
from torch import Tensor

from backbones.common.arguments import nonempty_path
from backbones.common.outputs import FIGURE, REPORT, add_overwrite, require_writable

logger = logging.getLogger("benchmark_na")

DTYPES = ("float32", "bfloat16", "float16")
# Our kernels, by device type.
OURS = {"cpu": "cpu", "cuda": "triton"}
# Contenders whose first call may compile.
COMPILED = {*OURS.values(), "flex"}
# The machine's reference: a product of two square matrices of this size.
MATMUL_SIZE = 1024


def call(attention: Attention, inputs: Sequence[Tensor], grad: Tensor | None) -> None:
    """A forward and, with ``grad``, a backward pass."""
    out = attention(*inputs)
    if grad is not None:
        torch.autograd.grad(out, inputs, grad)


@dataclass(frozen=True)
class Effort:
    """Number of turns, and limits of time and memory."""

    rounds: int = 15
    seconds: float = 1.0  # limit for all turns of a contender, except for the first 3
    turn_ms: float = 20.0
    max_seconds: float = 20.0
    max_gib: float = 4.0


def measure(
    setting: Setting,
    batch: int,
    dtype: torch.dtype,
    backward: bool,
    names: Sequence[str],
    device: torch.device,
    effort: Effort,
    expected: dict[str, float],
) -> dict[str, Any]:
    """Time all contenders alternately. ``expected``: known or estimated seconds per call."""
    shape = (batch, *setting.size, NUM_HEADS, setting.dim)
    generator = torch.Generator(device).manual_seed(0)
    query, key, value, grad = (
        torch.randn(shape, generator=generator, device=device).to(dtype) for _ in range(4)
    )
    inputs = [t.requires_grad_(backward) for t in (query, key, value)]
    matrix = torch.randn(MATMUL_SIZE, MATMUL_SIZE, device=device).to(dtype)
    runs: dict[str, Callable[[], object]] = {"matmul": lambda: matrix @ matrix}
    results: dict[str, dict[str, Any]] = {}
    # Seconds per turn; a contender that is too slow for turns has a single measurement instead.
    times: dict[str, list[float]] = {"matmul": []}
    estimates = {"matmul": stopwatch(runs["matmul"], device)}

    for name in names:
        needed = needed_gib(name, setting, batch, device)
        if needed > effort.max_gib:
            results[name] = {"skipped": f"needs {needed:.1f} GiB or more"}
            continue
        if expected.get(name, 0.0) > effort.max_seconds:
            seconds = expected[name]
            results[name] = {
                "skipped": f"about {seconds:.0f} s per call, extrapolated from a smaller batch"
            }
            continue
        try:
            attention = contender(name, setting, device)
            run = functools.partial(call, attention, inputs, grad if backward else None)
            for attempt in range(2):
                with PeakMemory(device) as memory:
                    estimates[name] = stopwatch(run, device)
                if estimates[name] > effort.seconds and (attempt or name not in COMPILED):
                    break
        except CannotRunError as error:
            results[name] = {"skipped": str(error)}
            continue
        results[name] = {"peak_bytes": memory.bytes}
        if estimates[name] > effort.seconds:
            times[name] = [estimates[name]]
        else:
            runs[name] = run
            times[name] = []

    turn_seconds = effort.turn_ms / 1e3
    for turn in range(effort.rounds):
        for name, run in runs.items():
            if turn >= 3 and turn * max(2 * estimates[name], turn_seconds) > effort.seconds:
                continue
            times[name].append(statistics.median(steady(run, device, turn_seconds)))

    flops = setting.flops(batch, backward)
    ours = OURS[device.type]
    matmul = 2 * MATMUL_SIZE**3 / statistics.median(times.pop("matmul"))
    for name, of_name in times.items():
        median = statistics.median(of_name)
        results[name].update(
            milliseconds=1e3 * median,
            gflops=flops / median / 1e9,
            fraction_of_matmul=flops / median / matmul,
            rounds=len(of_name),
        )
        if BASELINE in times:
            results[name]["speedup_over_tiled"] = ratio(times[BASELINE], of_name)
        if ours in times:
            results[name]["times_ours"] = ratio(of_name, times[ours])
    return {
        "setting": setting.name,
        **asdict(setting),
        "batch": batch,
        "heads": NUM_HEADS,
        "dtype": str(dtype).removeprefix("torch."),
        "backward": backward,
        "input_bytes": 3 * query.numel() * query.element_size(),
        "matmul_gflops": matmul / 1e9,
        "contenders": results,
    }


def ratio(times: Sequence[float], others: Sequence[float]) -> float:
    """Median of the ratios within turns; without turns, the ratio to the other's median."""
    if 1 in (len(times), len(others)):
        return statistics.median(times) / statistics.median(others)
    # Turns that one of the two left out have no ratio.
    return statistics.median(a / b for a, b in zip(times, others, strict=False))


def expected_seconds(
    report: dict[str, Any], setting: Setting, batch: int, dtype: str, backward: bool
) -> dict[str, float]:
    """Seconds per call by contender, extrapolated from the largest smaller batch."""
    smaller = [
        row
        for row in report["results"]
        if row_key(row) == (setting.name, row["batch"], dtype, backward) and row["batch"] < batch
    ]
    if not smaller:
        return {}
    row = max(smaller, key=lambda row: row["batch"])
    return {
        name: result["milliseconds"] / 1e3 * batch / row["batch"]
        for name, result in row["contenders"].items()
        if "milliseconds" in result
    }


def row_key(row: dict[str, Any]) -> tuple[str, int, str, bool]:
    """The settings of a row as a key."""
    return row["setting"], row["batch"], row["dtype"], row["backward"]


def add_row(report: dict[str, Any], row: dict[str, Any]) -> None:
    """Insert a row in the order of the settings, replacing an older one."""
    order = [setting.name for setting in SETTINGS]
    others = [other for other in report["results"] if row_key(other) != row_key(row)]

    def place(row: dict[str, Any]) -> tuple[int, int, int, bool]:
        name, batch, dtype, backward = row_key(row)
        return order.index(name), batch, DTYPES.index(dtype), backward

    report["results"] = sorted([*others, row], key=place)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [setting.name for setting in SETTINGS]
    parser.add_argument(
        *("--settings", "--shapes"),
        nargs="+",
        default=names,
        choices=names,
        metavar="NAME",
        help=f"default all of {', '.join(names)}",
    )
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=CONTENDERS)
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8])
    parser.add_argument(
        "--dtype",
        nargs="+",
        default=["float32", "bfloat16"],
        choices=DTYPES,
    )
    parser.add_argument(
        "--direction", nargs="+", default=["forward", "both"], choices=["forward", "both"]
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="of the CPU; default torch's")
    effort = Effort()
    parser.add_argument("--rounds", type=int, default=effort.rounds, help="turns per contender")
    parser.add_argument(
        "--seconds",
        type=float,
        default=effort.seconds,
        help="time limit of a contender's turns, of which there are at least 3",
    )
    parser.add_argument("--turn-ms", type=float, default=effort.turn_ms, help="duration of a turn")
    parser.add_argument(
        "--max-seconds",
        type=float,
        default=effort.max_seconds,
        help="skip contenders with longer calls, extrapolated from a smaller batch",
    )
    parser.add_argument(
        "--max-gib",
        type=float,
        default=effort.max_gib,
        help="skip contenders that need more memory",
    )
    parser.add_argument(
        "--resume", action="store_true", help="skip rows that the output already has"
    )
    parser.add_argument("--output", type=nonempty_path, default=Path("runs/benchmark_na"))
    add_overwrite(parser)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    output = args.output.with_suffix(".json")
    written = {"--output": (output, REPORT), "the picture": (output.with_suffix(".png"), FIGURE)}
    require_writable(written, overwrite=args.overwrite, makes_folders=True)
    report = load_report(output, machine(device))
    effort = Effort(args.rounds, args.seconds, args.turn_ms, args.max_seconds, args.max_gib)
    done = {row_key(row) for row in report["results"]} if args.resume else set()
    wanted = [setting for setting in SETTINGS if setting.name in args.settings]
    rows = itertools.product(args.dtype, sorted(args.batch), wanted, args.direction)
    for dtype, batch, setting, direction in rows:
        if (setting.name, batch, dtype, direction == "both") in done:
            continue
        row = measure(
            setting,
            batch,
            getattr(torch, dtype),
            direction == "both",
            args.contenders,
            device,
            effort,
            expected_seconds(report, setting, batch, dtype, direction == "both"),
        )
        add_row(report, row)
        text = json.dumps(report, indent=1)
        write(output, lambda path, text=text: path.write_text(text))
        logger.info("%s batch %d %s %s", setting.name, batch, dtype, direction)
        for name, result in row["contenders"].items():
            logger.info("    %-10s %s", name, describe(result))
    picture = args.output.with_suffix(".png")
    write(picture, lambda path: draw(report, path))
    logger.info("wrote %s and %s", output, picture)


def describe(result: dict[str, Any]) -> str:
    """The figures of a contender in one line."""
    if "skipped" in result:
        return f"left out: {result['skipped']}"
    peak = result["peak_bytes"]
    memory = "" if peak is None else f"  {peak / 2**20:8.1f} MiB"
    speedup = result.get("speedup_over_tiled")
    ratio = "" if speedup is None else f"  {speedup:6.2f}× tiled"
    return f"{result['milliseconds']:9.2f} ms  {result['gflops']:7.1f} GFLOP/s{ratio}{memory}"


if __name__ == "__main__":
    main()
