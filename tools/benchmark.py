"""Benchmark models, operators and whole programs beside any contender of ``contenders.py``.

    python tools/benchmark.py --models shvit_s4 --against openvino_nncf ~/original.py
    python tools/benchmark.py --op neighborhood --threads 1 --settings 56x56-k7-d32 --against flex
    python tools/benchmark.py --op gated --output runs/scans
    python tools/benchmark.py --op selective --against transformers mambapy
    python tools/benchmark.py --op zoo --models 'shvit_*' van_b0
    python tools/benchmark.py --op embed speed decoding
    python tools/benchmark.py --op training
    python tools/benchmark.py --op cold_start wheel --python /path/to/venv/bin/python
    python tools/benchmark.py --op guards --pythons python3.11 python3.13

Without ``--op``, it is ``vision-backbones benchmark`` with more contenders. Each operation has its
own ``--help``. Contenders of a row take turns in one process, so that other load affects them
equally; compare the ratios. ``make pages`` puts the results into the pages.
"""

from __future__ import annotations

import argparse
import fnmatch
import gc
import importlib
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from contenders import CONTENDERS

import backbones
from backbones.cli import benchmark as models
from backbones.cli.benchmark_report import describe
from backbones.cli.reports import load_report, parsed, put_rows, write_report
from backbones.cli.timing import machine
from backbones.common.arguments import real, whole
from backbones.common.console import Parser, guard
from backbones.core.registry import published_weights

logger = logging.getLogger(__name__)
ROOT = Path(__file__).resolve().parent.parent
ZOO = ROOT / "docs" / "performance" / "zoo.json"


def of_models(arguments: Sequence[str]) -> int:
    """Models, as ``vision-backbones benchmark``."""
    known = CONTENDERS["models"]
    epilog = f"--against also takes {', '.join(set(known) - set(models.MODELS))}"
    parser = Parser(prog="benchmark.py", description=__doc__, epilog=epilog)
    models.add_arguments(parser)
    return models.run(parser.parse_args(arguments), known)


def zoo(arguments: Sequence[str]) -> None:
    """Latency of every variant, for the zoo page: one image, one thread, plain and fused.

    The image size is that of the variant's published accuracy. On another machine or with another
    torch version, start a new file.
    """
    parser = Parser(prog="benchmark.py --op zoo", description=zoo.__doc__)
    parser.add_argument("--models", nargs="+", metavar="PATTERN", help="default: all")
    parser.add_argument("--rounds", type=whole(1), default=15, help="turns of both forms")
    text = "stop a variant's turns after"
    parser.add_argument("--seconds", type=real(0), default=60, help=text)
    args = parsed(parser, arguments, ZOO)
    names = backbones.list_models(args.models or "")
    for pattern in args.models or ():
        if not fnmatch.filter(names, pattern):
            parser.error(f"no model is named {pattern!r}; see backbones.list_models()")
    torch.set_num_threads(1)
    report = load_report(args.output, machine(torch.device("cpu")))
    for name in names:
        size = next(iter(published_weights(name).values())).input_size[-1]
        row = models.Row(name, size, 1, 1, "float32", "forward")
        measured = models.measure(row, ("eager", "fused"), {}, args.rounds, args.seconds)
        put_rows(report, [measured], ("model",))
        report["results"].sort(key=lambda result: result["model"])
        for contender, figures in measured["contenders"].items():
            logger.info("%-24s %-6s %s", name, contender, describe(figures))
        write_report(args.output, report)
        gc.collect()


def _from(module: str, function: str) -> Callable[[Sequence[str]], int | None]:
    """A function of another script, imported when it is called."""
    return lambda arguments: getattr(importlib.import_module(module), function)(arguments)


OPERATIONS: dict[str, Callable[[Sequence[str]], int | None]] = {
    "neighborhood": _from("benchmark_ops", "neighborhood"),
    "gated": _from("benchmark_ops", "gated"),
    "selective": _from("benchmark_ops", "selective"),
    "zoo": zoo,
    "embed": _from("benchmark_embed", "embedding"),
    "training": _from("benchmark_programs", "training"),
    "cold_start": _from("benchmark_programs", "cold_start"),
    "guards": _from("benchmark_programs", "guards"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from a command line; the exit status."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--op", choices=OPERATIONS)
    options, rest = parser.parse_known_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    return (OPERATIONS[options.op] if options.op else of_models)(rest) or 0


if __name__ == "__main__":
    sys.exit(guard(main))
