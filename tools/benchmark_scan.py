"""Benchmark gated linear attention on the CPU by length, and ViG compared with attention.

    python tools/benchmark_scan.py --output docs/performance/avx2/scans.json

One direction, one thread, float32, with ViG-T's state size. Our kernel is compared with the scan in
Python (``reference``), chunks in torch (``chunked``) and, if ``fla`` can be imported, that
library's CPU implementation (https://pypi.org/project/flash-linear-attention). In addition, fused
ViG-T is compared with timm's DeiT-T, whose attention is quadratic, on 1024×1024 images. All
contenders are measured alternately in one process; ratios are medians of those within a turn.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import logging
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from measuring import machine, steady, write
from torch import Tensor

import backbones
from backbones.core.arguments import nonempty_path, whole
from ops.linear_attention import gated_linear_attention

TOKENS = (196, 1023, 1024, 4096)
HEADS, KEYS, VALUES = 3, 32, 64
BACKENDS = ("cpu", "reference", "chunked")
SIDE = 1024
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
            "difference": ((runs[name]() - expected).abs().max() / expected.abs().max()).item(),
        }
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=nonempty_path, default=Path("runs/scans.json"))
    parser.add_argument("--rounds", type=whole(1), default=7, help="turns of every contender")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    report: dict[str, Any] = {"machine": machine(CPU), "scans": {}}
    with torch.inference_mode():
        for tokens in TOKENS:
            found = measure(scans(tokens), options.rounds, 0.3)
            report["scans"][str(tokens)] = found
            logger.info("%d tokens: %s", tokens, found)
        found = measure(networks(), min(3, options.rounds), 1.0)
        for figures in found.values():  # outputs of different networks cannot be compared
            del figures["difference"]
        report["networks"] = {"side": SIDE, **found}
        logger.info("%d×%d: %s", SIDE, SIDE, found)
    text = json.dumps(report, indent=1) + "\n"
    write(options.output, lambda path: path.write_text(text, encoding="utf-8"))


if __name__ == "__main__":
    main()
