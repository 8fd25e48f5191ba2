"""Benchmark the scans on the CPU by length, and ViG compared with attention.

    python tools/benchmark_scan.py --output docs/performance/avx2/scans.json
    python tools/benchmark_scan.py --selective --output docs/performance/zen4/selective_scans.json

All contenders are measured alternately in one process, with one thread, in float32; ratios are
medians of those within a turn. By default, gated linear attention in one direction, with ViG-T's
state size: our kernel is compared with the scan in Python (``reference``), chunks in torch
(``chunked``) and, if ``fla`` can be imported, that library's CPU implementation
(https://pypi.org/project/flash-linear-attention). In addition, fused ViG-T is compared with timm's
DeiT-T, whose attention is quadratic, on 1024×1024 images.

With ``--selective``, the selective scan with the channels of VMamba-T's first stage: the same
backends, transformers' scan of Mamba (``transformers``) and, if it can be imported, mambapy's
(https://pypi.org/project/mambapy), both without a groups' axis. ``map`` is a square map in four
orders. Bounds are the memory bandwidth, by torch's sum of a number and a large map, and the rate of
exponentials and logarithms, by numpy's on a small one: a step takes one of each, and a state
another exponential.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import logging
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from measuring import machine, steady, write
from torch import Tensor

import backbones
from backbones.common.arguments import nonempty_path, whole
from backbones.common.outputs import REPORT, add_overwrite, require_writable
from ops.linear_attention import gated_linear_attention
from ops.selective_scan import cross_selective_scan, selective_scan

TOKENS = (196, 1023, 1024, 4096)
HEADS, KEYS, VALUES = 3, 32, 64
BACKENDS = ("cpu", "reference", "chunked")
SIDE = 1024
ORDERS = 4
SELECTIVE_TOKENS = (196, 784, 3136, 4096)  # squares
CHANNELS = {1: 96, 16: 192}  # of an order, by states
CPU = torch.device("cpu")

logger = logging.getLogger("benchmark_scan")
Runs = Mapping[str, Callable[[], Tensor]]


def scans(tokens: int) -> Runs:
    """The contenders for a sequence of ``tokens`` tokens."""
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 1, tokens, HEADS, KEYS, generator=generator)
    value = torch.randn(1, tokens, HEADS, VALUES, generator=generator)
    log_gate = torch.randn(1, tokens, HEADS, KEYS, generator=generator).sigmoid().log() / 16
    runs: dict[str, Callable[[], Tensor]] = {
        name: functools.partial(gated_linear_attention, query, key, value, log_gate, backend=name)
        for name in BACKENDS
    }
    if importlib.util.find_spec("fla") is not None:
        from fla.ops.gla.naive import naive_recurrent_gla

        runs["fla"] = lambda: naive_recurrent_gla(query, key, value, log_gate)[0]
    return runs


def networks() -> Runs:
    """Fused ViG-T and timm's DeiT-T on one image."""
    ours = backbones.create_model("vig_t").eval().fuse()
    theirs = timm.create_model("deit_tiny_patch16_224", dynamic_img_size=True).eval()
    image = torch.randn(1, 3, SIDE, SIDE)
    return {"vig_t": lambda: ours(image), "deit_tiny": lambda: theirs(image)}


def selective_scans(tokens: int, states: int) -> Runs:
    """The contenders for the selective scan of ``tokens`` tokens, and the scan of a map."""
    from transformers.models.mamba.modeling_mamba import mamba_selective_scan

    generator = torch.Generator().manual_seed(0)
    normal = functools.partial(torch.randn, generator=generator)
    dim, side = CHANNELS[states], round(tokens**0.5)
    rank, channels = 96 // 16, ORDERS * dim
    u, delta = normal(2, 1, channels, tokens)
    before, after = normal(2, 1, ORDERS, states, tokens)
    rate, own = -torch.arange(1.0, 1 + states).repeat(channels, 1), torch.ones(channels)
    bias = torch.full((channels,), -4.0)
    options: dict[str, Any] = {"delta_bias": bias, "delta_softplus": True}
    inputs = (u, delta, rate, before, after, own)
    runs: dict[str, Callable[[], Tensor]] = {
        name: functools.partial(selective_scan, *inputs, **options, backend=name)
        for name in BACKENDS
    }
    # Orders as images, as they have the same rates here.
    images = [t.unflatten(1, (ORDERS, -1))[0] for t in (u, delta)]
    given = (*images, rate[:dim], before[0], after[0], own[:dim])
    of_dim = {**options, "delta_bias": bias[:dim]}
    loop = functools.partial(mamba_selective_scan, *given, **of_dim)
    runs["transformers"] = lambda: loop().flatten(0, 1)[None]
    if importlib.util.find_spec("mambapy") is not None:
        runs["mambapy"] = lambda: loop(use_mambapy=True).flatten(0, 1)[None]
    x = normal(1, side, side, dim)
    projected = normal(1, side, side, ORDERS * (rank + 2 * states))
    weight = normal(ORDERS, rank, dim).mT / 4
    runs["map"] = lambda: cross_selective_scan(x, projected, weight, rate, own, **options)
    return runs


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
            run = functools.partial(_repeat, functools.partial(function, given, out=made), calls)
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


def measure_selective(rounds: int) -> dict[str, Any]:
    """Results by states and tokens, with their bounds."""
    of = rates(rounds)
    report: dict[str, Any] = {"nanoseconds": of, "scans": []}
    for states in CHANNELS:
        for tokens in SELECTIVE_TOKENS:
            found = measure(selective_scans(tokens, states), rounds, 0.1)
            del found["map"]["difference"]  # not of the same inputs
            row = {"states": states, "tokens": tokens, "channels": ORDERS * CHANNELS[states]}
            least = bounds(tokens, states, of)
            report["scans"].append({**row, "bounds": least, "contenders": found})
            logger.info("%s: %s", {**row, **least}, found)
    return report


def measure(runs: Runs, rounds: int, seconds: float) -> dict[str, dict[str, float]]:
    """Milliseconds of each contender, and its time relative to the first one's."""
    first = next(iter(runs))
    expected = runs[first]()
    turns: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            turns[name].append(statistics.median(steady(run, CPU, seconds)))
    found = {}
    for name, times in turns.items():
        found[name] = {
            "milliseconds": 1e3 * statistics.median(times),
            "times_longer": statistics.median(
                own / base for own, base in zip(times, turns[first], strict=True)
            ),
            "difference": _difference(runs[name](), expected),
        }
    return found


def measure_gated(rounds: int) -> dict[str, Any]:
    """Gated linear attention by tokens, and networks."""
    report: dict[str, Any] = {"scans": {}}
    for tokens in TOKENS:
        found = measure(scans(tokens), rounds, 0.3)
        report["scans"][str(tokens)] = found
        logger.info("%d tokens: %s", tokens, found)
    found = measure(networks(), min(3, rounds), 1.0)
    for figures in found.values():  # outputs of different networks cannot be compared
        del figures["difference"]
    report["networks"] = {"side": SIDE, **found}
    logger.info("%d×%d: %s", SIDE, SIDE, found)
    return report


def _difference(out: Tensor, expected: Tensor) -> float:
    if out.shape != expected.shape:  # of another input
        return math.nan
    return ((out - expected).abs().max() / expected.abs().max()).item()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=nonempty_path, default=Path("runs/scans.json"))
    parser.add_argument("--rounds", type=whole(1), default=7, help="turns of every contender")
    parser.add_argument("--selective", action="store_true", help="the selective scan instead")
    add_overwrite(parser)
    options = parser.parse_args(arguments)
    written = {"--output": (options.output, REPORT)}
    require_writable(written, overwrite=options.overwrite, makes_folders=True)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    with torch.inference_mode():
        found = (measure_selective if options.selective else measure_gated)(options.rounds)
    text = json.dumps({"machine": machine(CPU), **found}, indent=1) + "\n"
    write(options.output, lambda path: path.write_text(text, encoding="utf-8"))


if __name__ == "__main__":
    main()
