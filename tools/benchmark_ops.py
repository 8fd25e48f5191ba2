"""Neighborhood attention and scans, for ``benchmark.py --op``: our kernels beside alternatives."""

from __future__ import annotations

import itertools
import logging
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from contenders import CONTENDERS, NUM_HEADS, SETTINGS, Attention, Setting, needed_gib
from torch import Tensor

import backbones
from backbones.cli import timing
from backbones.cli.contenders import CannotRunError
from backbones.cli.reports import load_report, parsed, put_rows, write_report
from backbones.cli.timing import PeakMemory, machine, ratio, steady, stopwatch
from backbones.common.arguments import whole
from backbones.common.console import Parser
from ops.selective_scan import cross_selective_scan

logger = logging.getLogger(__name__)
CPU = torch.device("cpu")
DTYPES = ("float32", "bfloat16", "float16")
BASELINE = "tiled"
KEYS = ("setting", "batch", "dtype", "backward")
# Our kernels, by device type.
OURS = {"cpu": "cpu", "cuda": "triton"}
# Contenders whose first call may compile.
COMPILED = {*OURS.values(), "flex"}

# -- neighborhood attention ------------------------------------------------------------------------


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
    expected: Mapping[str, float],
) -> dict[str, Any]:
    """Time all contenders alternately. ``expected``: known or estimated seconds per call."""
    shape = (batch, *setting.size, NUM_HEADS, setting.dim)
    generator = torch.Generator(device).manual_seed(0)
    query, key, value, grad = (
        torch.randn(shape, generator=generator, device=device).to(dtype) for _ in range(4)
    )
    inputs = [t.requires_grad_(backward) for t in (query, key, value)]
    runs: dict[str, Callable[[], object]] = {"matmul": timing.matmul(dtype, device)}
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
            about = f"about {expected[name]:.0f} s per call"
            results[name] = {"skipped": f"{about}, extrapolated from a smaller batch"}
            continue
        try:
            attention = CONTENDERS["neighborhood"][name](setting, device)
            run = partial(call, attention, inputs, grad if backward else None)
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
    matmul = timing.MATMUL_FLOPS / statistics.median(times.pop("matmul"))
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


def expected_seconds(
    report: Mapping[str, Any], setting: Setting, batch: int, dtype: str, backward: bool
) -> dict[str, float]:
    """Seconds per call by contender, extrapolated from the largest smaller batch."""
    found: dict[str, float] = {}
    for row in sorted(report["results"], key=lambda row: row["batch"]):
        if row["batch"] < batch and row_key(row) == (setting.name, row["batch"], dtype, backward):
            timed = {n: r for n, r in row["contenders"].items() if "milliseconds" in r}
            found = {n: r["milliseconds"] / 1e3 * batch / row["batch"] for n, r in timed.items()}
    return found


def row_key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """The settings of a row as a key."""
    return tuple(row[key] for key in KEYS)


def _place(row: Mapping[str, Any]) -> tuple[int, int, int, bool]:
    """Rows stand in the order of the settings."""
    name, batch, dtype, backward = row_key(row)
    order = [setting.name for setting in SETTINGS]
    return order.index(name), batch, DTYPES.index(dtype), backward


def neighborhood(arguments: Sequence[str]) -> None:
    """Neighborhood attention (https://arxiv.org/abs/2204.07143): every backend and alternatives.

    A contender whose calls take longer than ``--seconds`` is timed once. One that does not support
    a setting, would need more than ``--max-gib`` of memory or, extrapolated from a smaller batch,
    more than ``--max-seconds`` per call, is listed with the reason instead of a time. The full
    sweep takes long: measure it in parts (``--settings``) or with ``--resume``.
    """
    parser = Parser(prog="benchmark.py --op neighborhood", description=neighborhood.__doc__)
    add, effort = parser.add_argument, Effort()
    names, known = [setting.name for setting in SETTINGS], list(CONTENDERS["neighborhood"])
    text = f"default: all of {', '.join(names)}"
    add("--settings", nargs="+", default=names, choices=names, metavar="NAME", help=text)
    add("--against", nargs="+", default=known, choices=known, help="default all")
    add("--batch", nargs="+", type=whole(1), default=[1, 8])
    add("--dtype", nargs="+", default=["float32", "bfloat16"], choices=DTYPES)
    add("--direction", nargs="+", default=["forward", "both"], choices=["forward", "both"])
    add("--device", default="cpu")
    add("--threads", type=whole(1), help="CPU threads (default: torch's)")
    add("--rounds", type=whole(1), default=effort.rounds, help="turns per implementation")
    text = "time limit of an implementation's turns, of which there are at least 3"
    add("--seconds", type=float, default=effort.seconds, help=text)
    add("--turn-ms", type=float, default=effort.turn_ms, help="duration of a turn")
    text = "skip implementations with longer calls, extrapolated from a smaller batch"
    add("--max-seconds", type=float, default=effort.max_seconds, help=text)
    add("--max-gib", type=float, default=effort.max_gib, help="skip those that need more memory")
    add("--resume", action="store_true", help="skip rows that the output already has")
    args = parsed(parser, arguments, Path("runs/neighborhood.json"))
    if args.threads:
        torch.set_num_threads(args.threads)
    device, output = torch.device(args.device), args.output
    report = load_report(output, machine(device))
    effort = Effort(args.rounds, args.seconds, args.turn_ms, args.max_seconds, args.max_gib)
    done = {row_key(row) for row in report["results"]} if args.resume else set()
    wanted = [setting for setting in SETTINGS if setting.name in args.settings]
    rows = itertools.product(args.dtype, sorted(args.batch), wanted, args.direction)
    for dtype, batch, setting, direction in rows:
        backward = direction == "both"
        if (setting.name, batch, dtype, backward) in done:
            continue
        expected = expected_seconds(report, setting, batch, dtype, backward)
        kind = getattr(torch, dtype)
        row = measure(setting, batch, kind, backward, args.against, device, effort, expected)
        put_rows(report, [row], KEYS)
        report["results"].sort(key=_place)
        write_report(output, report)
        logger.info("%s batch %d %s %s", setting.name, batch, dtype, direction)
        for name, result in row["contenders"].items():
            logger.info("    %-10s %s", name, describe(result))
    logger.info("wrote %s", output)


def describe(result: Mapping[str, Any]) -> str:
    """The figures of a contender in one line."""
    if "skipped" in result:
        return f"left out: {result['skipped']}"
    peak = result["peak_bytes"]
    memory = "" if peak is None else f"  {peak / 2**20:8.1f} MiB"
    speedup = result.get("speedup_over_tiled")
    ratio = "" if speedup is None else f"  {speedup:6.2f}× tiled"
    return f"{result['milliseconds']:9.2f} ms  {result['gflops']:7.1f} GFLOP/s{ratio}{memory}"


# -- scans -----------------------------------------------------------------------------------------

TOKENS = (196, 1023, 1024, 4096)
HEADS, KEY_DIM, VALUE_DIM = 3, 32, 64  # those of ViG-T
SIDE = 1024
ORDERS = 4
SELECTIVE_TOKENS = (196, 784, 3136, 4096)  # squares
CHANNELS = {1: 96, 16: 192}  # of an order in VMamba-T's first stage, by states

Runs = Mapping[str, Callable[[], Tensor]]


def _made(op: str, names: Sequence[str], *inputs: Any, **options: Any) -> dict[str, Any]:
    """The contenders that can run, ours first."""
    runs = {}
    for name in dict.fromkeys(["cpu", *names]):
        try:
            runs[name] = CONTENDERS[op][name](*inputs, **options)
        except CannotRunError as error:
            logger.info("%s: %s", name, error)
    return runs


def scans(tokens: int, names: Sequence[str]) -> Runs:
    """The contenders for a sequence of ``tokens`` tokens."""
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 1, tokens, HEADS, KEY_DIM, generator=generator)
    value = torch.randn(1, tokens, HEADS, VALUE_DIM, generator=generator)
    log_gate = torch.randn(1, tokens, HEADS, KEY_DIM, generator=generator).sigmoid().log() / 16
    return _made("gated", names, query, key, value, log_gate)


def networks() -> Runs:
    """Fused ViG-T and timm's DeiT-T on one image."""
    ours = backbones.create_model("vig_t").eval().fuse()
    theirs = timm.create_model("deit_tiny_patch16_224", dynamic_img_size=True).eval()
    image = torch.randn(1, 3, SIDE, SIDE)
    return {"vig_t": lambda: ours(image), "deit_tiny": lambda: theirs(image)}


def selective_scans(tokens: int, states: int, names: Sequence[str]) -> Runs:
    """The contenders for the selective scan of ``tokens`` tokens, and the scan of a map."""
    generator = torch.Generator().manual_seed(0)
    normal = partial(torch.randn, generator=generator)
    dim, side = CHANNELS[states], round(tokens**0.5)
    rank, channels = 96 // 16, ORDERS * dim
    u, delta = normal(2, 1, channels, tokens)
    before, after = normal(2, 1, ORDERS, states, tokens)
    rate, own = -torch.arange(1.0, 1 + states).repeat(channels, 1), torch.ones(channels)
    bias = torch.full((channels,), -4.0)
    options: dict[str, Any] = {"delta_bias": bias, "delta_softplus": True}
    runs = _made("selective", names, (u, delta, rate, before, after, own), **options)
    x = normal(1, side, side, dim)
    projected = normal(1, side, side, ORDERS * (rank + 2 * states))
    weight = normal(ORDERS, rank, dim).mT / 4
    return {
        **runs,
        "map": lambda: cross_selective_scan(x, projected, weight, rate, own, **options),
    }


def rates(rounds: int) -> dict[str, float]:
    """Nanoseconds of numpy's exponential and logarithm, and of a byte read or written.

    Those of the fastest calls, as they are for bounds.
    """

    def fastest(run: Callable[[], object]) -> float:
        return 1e9 * min(min(steady(run, CPU, 0.1)) for _ in range(rounds))

    def of_each(function: np.ufunc, calls: int = 100) -> float:
        """In the L1 cache, without what a call costs."""
        times = []
        for size in (1, 1 << 12):
            given = np.linspace(-1, 0, size, dtype=np.float32) + (function is np.log1p)
            made = np.empty_like(given)
            run = partial(_repeat, partial(function, given, out=made), calls)
            times.append(fastest(run))
        return (times[1] - times[0]) / calls / ((1 << 12) - 1)

    large = torch.ones(1 << 25)
    copied = torch.empty_like(large)
    moved = fastest(lambda: torch.add(large, 1, out=copied)) / (2 * 4 * large.numel())
    return {"exponential": of_each(np.exp2), "logarithm": of_each(np.log1p), "byte": moved}


def _repeat(run: Callable[[], object], calls: int) -> None:
    for _ in range(calls):
        run()


def bounds(tokens: int, states: int, of: Mapping[str, float]) -> dict[str, float]:
    """Milliseconds that :func:`selective_scans` take at the least by :func:`rates`."""
    steps = tokens * ORDERS * CHANNELS[states]
    maps = 3 * steps + 2 * tokens * ORDERS * states
    computed = steps * ((1 + states) * of["exponential"] + of["logarithm"])
    return {"memory": 1e-6 * 4 * maps * of["byte"], "exponentials": 1e-6 * computed}


def _compare(runs: Runs, rounds: int, seconds: float) -> dict[str, dict[str, float]]:
    """Milliseconds of each contender, and its time relative to the first one's."""
    first = next(iter(runs))
    expected = runs[first]()
    turns: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            turns[name].append(statistics.median(steady(run, CPU, seconds)))
    return {
        name: {
            "milliseconds": 1e3 * statistics.median(times),
            "times_longer": ratio(times, turns[first]),
            "difference": _difference(runs[name](), expected),
        }
        for name, times in turns.items()
    }


def _difference(out: Tensor, expected: Tensor) -> float:
    if out.shape != expected.shape:  # of another input
        return math.nan
    return ((out - expected).abs().max() / expected.abs().max()).item()


def _scan_options(op: str, arguments: Sequence[str], description: str) -> Any:
    parser = Parser(prog=f"benchmark.py --op {op}", description=description)
    known = list(CONTENDERS[op])
    parser.add_argument("--against", nargs="+", default=known, choices=known, help="default all")
    parser.add_argument("--rounds", type=whole(1), default=7, help="turns of every implementation")
    torch.set_num_threads(1)
    return parsed(parser, arguments, Path(f"runs/{op}.json"))


@torch.inference_mode()
def gated(arguments: Sequence[str]) -> None:
    """Gated linear attention in one direction by length, and ViG beside attention.

    One thread, float32, with ViG-T's state size. Fused ViG-T is compared with timm's DeiT-T, whose
    attention is quadratic, on an image of 1024×1024.
    """
    options = _scan_options("gated", arguments, gated.__doc__ or "")
    report: dict[str, Any] = {"machine": machine(CPU), "scans": {}}
    for tokens in TOKENS:
        found = _compare(scans(tokens, options.against), options.rounds, 0.3)
        report["scans"][str(tokens)] = found
        logger.info("%d tokens: %s", tokens, found)
    found = _compare(networks(), min(3, options.rounds), 1.0)
    for figures in found.values():  # outputs of different networks cannot be compared
        del figures["difference"]
    report["networks"] = {"side": SIDE, **found}
    logger.info("%d×%d: %s", SIDE, SIDE, found)
    write_report(options.output, report)


@torch.inference_mode()
def selective(arguments: Sequence[str]) -> None:
    """The selective scan by states and length, and of a square map in four orders (``map``).

    One thread, float32, with the channels of VMamba-T's first stage. Bounds are the memory
    bandwidth, by torch's sum of a number and a large map, and the rate of exponentials and
    logarithms, by numpy's on a small one: a step takes one of each, and a state another
    exponential.
    """
    options = _scan_options("selective", arguments, selective.__doc__ or "")
    of = rates(options.rounds)
    report: dict[str, Any] = {"machine": machine(CPU), "nanoseconds": of, "scans": []}
    for states, tokens in itertools.product(CHANNELS, SELECTIVE_TOKENS):
        found = _compare(selective_scans(tokens, states, options.against), options.rounds, 0.1)
        del found["map"]["difference"]  # not of the same inputs
        row = {"states": states, "tokens": tokens, "channels": ORDERS * CHANNELS[states]}
        row["bounds"] = bounds(tokens, states, of)
        report["scans"].append({**row, "contenders": found})
        logger.info("%s: %s", row, found)
    write_report(options.output, report)
