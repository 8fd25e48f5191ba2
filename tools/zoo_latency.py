"""Measure the latency of every variant, for the zoo page: one image, one thread, plain and fused.

    python tools/zoo_latency.py
    python tools/zoo_latency.py --models 'shvit_*' van_b0  # only these; the rest is kept

The image size is that of the variant's published accuracy. The two forms are measured alternately
in one process, as in ``tools/benchmark.py``. Writes ``docs/performance/zoo.json`` after every
variant; on another machine or with another torch version it starts a new file.
"""

from __future__ import annotations

import argparse
import fnmatch
import gc
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from benchmark import Row, measure
from benchmark_report import describe
from measuring import machine, write

import backbones
from backbones.common.arguments import nonempty_path
from backbones.common.outputs import REPORT, add_overwrite, require_writable
from backbones.core.registry import published_weights

OUTPUT = Path(__file__).resolve().parent.parent / "docs" / "performance" / "zoo.json"

logger = logging.getLogger("zoo_latency")


def own_size(name: str) -> int:
    """Image size of the first published weights."""
    cfg = next(iter(published_weights(name).values()))
    return cfg.input_size[-1]


def report_so_far(path: Path, here: dict[str, Any]) -> dict[str, Any]:
    """The existing report, if it was measured on this machine."""
    if path.exists():
        report = json.loads(path.read_text())
        if report["machine"] == here:
            return report
    return {"machine": here, "results": []}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", metavar="PATTERN", help="default: all")
    parser.add_argument("--rounds", type=int, default=15, help="turns of both forms")
    parser.add_argument("--seconds", type=float, default=60, help="stop a variant's turns after")
    parser.add_argument("--output", type=nonempty_path, default=OUTPUT)
    add_overwrite(parser)
    args = parser.parse_args(arguments)
    written = {"--output": (args.output, REPORT)}
    require_writable(written, overwrite=args.overwrite, makes_folders=True)
    names = backbones.list_models(args.models or "")
    for pattern in args.models or ():
        if not fnmatch.filter(names, pattern):
            parser.error(f"no model is named {pattern!r}; see backbones.list_models()")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    report = report_so_far(args.output, machine(torch.device("cpu")))
    for name in names:
        row = Row(name, own_size(name), 1, 1, "float32", "forward")
        measured = measure(row, ("eager", "fused"), {}, args.rounds, args.seconds)
        kept = [result for result in report["results"] if result["model"] != name]
        report["results"] = sorted([*kept, measured], key=lambda result: result["model"])
        for contender, figures in measured["contenders"].items():
            logger.info("%-24s %-6s %s", name, contender, describe(figures))
        text = json.dumps(report, indent=1) + "\n"
        write(args.output, lambda path, text=text: path.write_text(text))
        gc.collect()


if __name__ == "__main__":
    main()
