"""Benchmark the models: plain, fused and compiled, compared with timm, peers and originals.

All contenders of a row are measured alternately in one process, so that other load affects them
equally; compare the ratios, which are taken within a turn. A turn repeats the call for
``--turn-ms`` and counts the second half, since the first calls run with caches filled by another
contender, unlike in production. After half of the turns, all models are created again in reverse
order.

    python tools/benchmark.py --models unireplknet_a van_b0 --batches 1 8 --threads 1 2
    python tools/benchmark.py --modes eager fused fused+bfloat16 --against birder ~/original.py
    python tools/benchmark.py --models ravlt_t --sizes 224 384 512 768 1024 --modes fused
    python tools/benchmark.py --compare runs/benchmark.json --output runs/benchmark_new

A mode is one of eager, channels_last (eager with weights in that format), fused, compile and
fused+compile, in the row's dtype or, with ``+bfloat16``, in bfloat16. ``--against`` names an
importable module or a Python file with a function ``create_model(name)``, which returns its model
for our name, or None if it has none. ``timm`` and ``birder`` are built in, and so are
``onnxruntime``, ``openvino`` and ``openvino_bf16``, which run our model's ONNX export. The label in
the report is the module's or file's name, here ``original``:

    import sys

    sys.path.append("/where/the/authors/code/lies")

    def create_model(name):
        if name == "van_b0":
            from models.van import van_b0
            return van_b0()
        return None

Writes ``<output>.json`` after every row, and ``<output>.md`` and ``<output>.png`` at the end. Runs
with the same ``--output`` extend the same report, so it can be measured in parts: a repeated row
replaces the old one, and ``--resume`` measures only missing rows. ``--profile`` adds the time spent
in kinds of operators by the plain and the fused model.
"""

from __future__ import annotations

import argparse
import functools
import gc
import importlib.util
import itertools
import json
import logging
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from benchmark_report import comparison, describe, draw, row_key, table
from measuring import PeakMemory, load_report, machine, read_report, steady, write
from op_kinds import KINDS, kind_of, time_by_kind
from peers import Create, is_installed, peer
from torch import Tensor, nn

import backbones
from backbones.cli.measure import count_macs
from backbones.common.arguments import THREADS, nonempty_path, real, whole
from backbones.common.console import Parser, guard
from backbones.common.errors import CommandError
from backbones.common.outputs import FIGURE, REPORT, Kind, add_overwrite, require_writable
from backbones.core.from_timm import PREFIX
from backbones.core.inputs import require_size, size_of
from backbones.core.messages import first_line

__all__ = ["KINDS", "Row", "comparison", "describe", "kind_of", "main", "measure", "parse", "peer"]

logger = logging.getLogger("benchmark")

MODES = ("eager", "channels_last", "fused", "compile", "fused+compile")
PLAIN = ("eager", "channels_last")  # forms that a fused model must not be slower than
LOW_PRECISION = "+bfloat16"
DTYPES = ("float32", "bfloat16")
MODELS = (
    *("efficientvit_m5", "shvit_s4", "inception_next_tiny", "unireplknet_a", "unireplknet_t"),
    *("van_b0", "biformer_tiny", "litv2_s", "favit_b0", "ravlt_t", "medvitv2_tiny", "hat_s_x2"),
)
# Restoration works on tiles.
DEFAULT_SIZE, DEFAULT_TILE = 224, 64
# The machine's reference: a product of two square matrices of this size.
MATMUL_SIZE = 1024
CPU = torch.device("cpu")


class Row:
    """One model at one size, batch, number of threads, dtype and direction."""

    def __init__(
        self, model: str, size: int, batch: int, threads: int, dtype: str, direction: str
    ) -> None:
        self.model, self.size, self.batch = model, size, batch
        self.threads, self.dtype, self.direction = threads, dtype, direction

    @property
    def key(self) -> dict[str, Any]:
        return dict(vars(self))

    def images(self, batch: int) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randn(batch, 3, self.size, self.size, generator=generator)

    def run(self, model: nn.Module, images: Tensor) -> Callable[[], Tensor]:
        """The timed function: a forward pass, or a training step with plain gradient descent."""
        if self.direction == "forward":
            return functools.partial(_forward, model, images)
        for layer in model.modules():  # stochastic depth depends on the recipe, and defaults differ
            if isinstance(getattr(layer, "drop_prob", None), float):
                layer.drop_prob = 0.0
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-9)
        return functools.partial(_step, model, images, optimizer)


def _forward(model: nn.Module, images: Tensor) -> Tensor:
    with torch.inference_mode():
        return model(images)


def _step(model: nn.Module, images: Tensor, optimizer: torch.optim.Optimizer) -> Tensor:
    optimizer.zero_grad()
    out = model(images)
    out = out[0] if isinstance(out, tuple) else out
    loss = out.float().square().mean()
    loss.backward()
    optimizer.step()
    return loss


def dtype_of(contender: str, row: Row) -> torch.dtype:
    """The contender's dtype: the row's, unless its mode sets another."""
    return torch.bfloat16 if contender.endswith(LOW_PRECISION) else getattr(torch, row.dtype)


def _ours(name: str, mode: str, row: Row) -> nn.Module:
    torch.manual_seed(0)
    model = backbones.create_model(name).train(row.direction == "train")
    dtype = dtype_of(mode, row)
    if mode.startswith("fused"):
        backbones.fuse(model, dtype)
    model.to(dtype)
    if mode.startswith("channels_last"):
        model.to(memory_format=torch.channels_last)
    return torch.compile(model) if "compile" in mode else model


def _theirs(create: Create, row: Row) -> nn.Module | None:
    torch.manual_seed(0)
    model = create(row.model)
    if model is None:
        return None
    return model.train(row.direction == "train").to(getattr(torch, row.dtype))


def measure(
    row: Row,
    modes: Sequence[str],
    peers: dict[str, Create],
    rounds: int,
    seconds: float,
    turn_seconds: float = 0.3,
    profile: bool = False,
) -> dict[str, Any]:
    """Times of all contenders, alternately: ``rounds`` turns or ``seconds``, at least 2 per half.

    A turn repeats the call for ``turn_seconds``, see :func:`measuring.steady`.
    """
    torch.set_num_threads(row.threads)
    images = row.images(row.batch)
    makers: dict[str, Callable[[], nn.Module | None]] = {
        mode: functools.partial(_ours, row.model, mode, row)
        for mode in modes
        if row.direction == "forward" or not mode.startswith("fused")
    }
    makers |= {label: functools.partial(_theirs, create, row) for label, create in peers.items()}
    results: dict[str, dict[str, Any]] = {}
    outputs: dict[str, Tensor] = {}
    turns: dict[str, list[list[float]]] = {}
    # Models created later get faster memory, by up to 3 %, so half of the turns use each order.
    halves = ((list(makers), rounds - rounds // 2), (list(makers)[::-1], rounds // 2))
    for order, part in halves[: min(rounds, 2)]:
        runs: dict[str, Callable[[], Tensor]] = {}
        for name in order:
            if "skipped" in results.get(name, {}):
                continue
            try:
                model = makers[name]()
                if model is None:
                    turns.pop(name, None)
                    results.pop(name, None)
                    continue
                run = row.run(model, images.to(dtype_of(name, row)))
                start = time.perf_counter()
                outputs[name] = run().float()  # compiles, packs weights
                warm_up = time.perf_counter() - start
                with PeakMemory(images.device) as memory:
                    run()
            except (RuntimeError, ImportError, NotImplementedError, TypeError, ValueError) as error:
                results[name] = {"skipped": f"{type(error).__name__}: {first_line(error)}"}
                turns.pop(name, None)
            else:
                runs[name] = run
                results[name] = {"peak_bytes": memory.bytes, "warm_up_seconds": warm_up}
        yardsticks = {str(dtype_of(name, row)).removeprefix("torch.") for name in runs}
        runs |= {dtype: _matmul(dtype) for dtype in sorted(yardsticks)}
        deadline = time.perf_counter() + seconds / 2
        for turn in range(part):
            if turn >= 2 and time.perf_counter() > deadline:
                break
            for name, timed in runs.items():
                turns.setdefault(name, []).append(steady(timed, images.device, turn_seconds))

    height, width = images.shape[2:]
    macs = count_macs(backbones.create_model(row.model), height, width)
    medians = {name: list(map(statistics.median, of_name)) for name, of_name in turns.items()}
    peaks = {
        dtype: 2 * MATMUL_SIZE**3 / statistics.median(medians.pop(dtype)) for dtype in yardsticks
    }
    passes = 1 if row.direction == "forward" else 3
    for name, of_name in medians.items():
        peak = peaks[str(dtype_of(name, row)).removeprefix("torch.")]
        flops = 2 * macs * row.batch * passes
        results[name].update(_figures(sum(turns[name], []), row.batch, flops, peak))
        results[name]["speedup_over"] = {
            other: statistics.median(b / a for a, b in zip(of_name, medians[other], strict=True))
            for other in medians
            if other != name and (other in PLAIN or other in peers)
        }
        if name in modes and name != "eager" and "eager" in medians and row.direction == "forward":
            exact = outputs["eager"]
            error = (outputs[name] - exact).abs().max() / exact.abs().max()
            results[name]["difference_from_eager"] = error.item()
        if profile and name in ("eager", "fused", "fused" + LOW_PRECISION):
            results[name]["time_by_kind"] = time_by_kind(runs[name])
    gflops = {dtype: peak / 1e9 for dtype, peak in peaks.items()}
    facts = {"macs": macs, "matmul_gflops": gflops, "orders": min(rounds, 2)}
    facts["versions"] = {label: version(label) for label in peers if is_installed(label)}
    return {**row.key, **facts, "contenders": results}


def _matmul(dtype: str) -> Callable[[], Tensor]:
    matrix = torch.randn(MATMUL_SIZE, MATMUL_SIZE).to(getattr(torch, dtype))
    return lambda: matrix @ matrix


def _figures(times: list[float], batch: int, flops: float, peak: float) -> dict[str, Any]:
    ordered = sorted(times)
    median = statistics.median(times)

    def percentile(share: float) -> float:
        return 1e3 * ordered[min(len(ordered) - 1, math.ceil(share * len(ordered)) - 1)]

    return {
        "milliseconds": 1e3 * median,
        "fastest": 1e3 * ordered[0],
        "p90": percentile(0.9),
        "p99": percentile(0.99),
        "images_per_second": batch / median,
        "gflops": flops / median / 1e9,
        "fraction_of_matmul": flops / median / peak,
        "calls": len(times),
    }


_TABLE = Kind((".md",), rb"[^\n]*; medians of interleaved runs\.\n")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(MODELS), metavar="NAME")
    parser.add_argument(
        "--sizes",
        nargs="+",
        type=whole(1, 65535),
        help="default 224, for HAT 64, for timm's its own",
    )
    parser.add_argument("--batches", nargs="+", type=whole(1), default=[1, 8])
    parser.add_argument("--threads", nargs="+", type=THREADS, default=[1])
    parser.add_argument("--dtypes", nargs="+", default=["float32"], choices=DTYPES)
    parser.add_argument(
        "--modes",
        nargs="+",
        default=["eager", "fused"],
        choices=[*MODES, *(mode + LOW_PRECISION for mode in MODES)],
    )
    parser.add_argument(
        "--directions", nargs="+", default=["forward"], choices=["forward", "train"]
    )
    parser.add_argument("--against", nargs="*", default=["timm"], metavar="PACKAGE_OR_FILE")
    parser.add_argument("--rounds", type=whole(1), default=9, help="turns per contender")
    parser.add_argument("--seconds", type=real(0), default=60, help="stop a row's turns after")
    parser.add_argument("--turn-ms", type=real(0), default=300.0, help="duration of a turn")
    parser.add_argument("--profile", action="store_true", help="also profile kinds of operators")
    parser.add_argument(
        "--resume", action="store_true", help="skip rows that the output already has"
    )
    parser.add_argument(
        "--compare", type=nonempty_path, metavar="OLD.json", help="an earlier report"
    )
    parser.add_argument("--output", type=nonempty_path, default=Path("runs/benchmark"))
    add_overwrite(parser)
    args = parser.parse_args(arguments)
    unknown = {name for name in args.models if not name.startswith(PREFIX)}
    unknown -= set(backbones.list_models())
    if unknown:
        parser.error(f"unknown models {', '.join(sorted(unknown))}; see backbones.list_models()")
    if args.compare is not None and not args.compare.is_file():
        parser.error(f"--compare: there is no file {args.compare}")
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    kinds = {".json": REPORT, ".md": _TABLE, ".png": FIGURE}
    written = {f"--output, {end}:": (args.output.with_suffix(end), kinds[end]) for end in kinds}
    require_writable(written, [args.compare], args.overwrite, makes_folders=True)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    output = args.output.with_suffix(".json")
    try:
        default_sizes = {name: _default_size(name, args.sizes or ()) for name in args.models}
        old = None if args.compare is None else read_report(args.compare)
        peers = dict(peer(name) for name in args.against)
        report = load_report(output, here())
    except ValueError as error:
        raise CommandError(str(error)) from error
    done = {row_key(row) for row in report["results"]} if args.resume else set()
    settings = itertools.product(args.threads, args.dtypes, args.directions, args.batches)
    for (threads, dtype, direction, batch), name in itertools.product(settings, args.models):
        for size in args.sizes or [default_sizes[name]]:
            row = Row(name, size, batch, threads, dtype, direction)
            if row_key(row.key) in done:
                continue
            turn = args.turn_ms / 1e3
            measured = measure(
                row, args.modes, peers, args.rounds, args.seconds, turn, args.profile
            )
            add_row(report, measured)
            logger.info("%s", " ".join(f"{k} {v}" for k, v in row.key.items()))
            for contender, figures in measured["contenders"].items():
                logger.info("    %-14s %s", contender, describe(figures))
            write(output, functools.partial(_write_text, json.dumps(report, indent=1) + "\n"))
            torch._dynamo.reset()
            gc.collect()
    write(args.output.with_suffix(".md"), functools.partial(_write_text, table(report)))
    if importlib.util.find_spec("matplotlib") is None:
        logger.info("no picture without matplotlib: pip install matplotlib")
    else:
        write(args.output.with_suffix(".png"), functools.partial(draw, report))
    if old is not None:
        for line in comparison(old, report):
            logger.info("%s", line)


def _default_size(name: str, sizes: Sequence[int]) -> int:
    """The size to measure a model at.

    Args:
        sizes: that are asked for instead.

    Raises:
        ValueError: timm has no such model, or it does not take one of the sizes.
    """
    if not name.startswith(PREFIX):
        return DEFAULT_TILE if name.startswith("hat") else DEFAULT_SIZE
    model = backbones.create_model(name)
    require_size(model, *((size, size) for size in sizes))
    return size_of(model)[0]


def here() -> dict[str, Any]:
    """The machine; each row has its own number of threads."""
    return {key: value for key, value in machine(CPU).items() if key != "threads"}


def add_row(report: dict[str, Any], row: dict[str, Any]) -> None:
    """Replace the older row with the same settings, or append the row."""
    keys = [row_key(other) for other in report["results"]]
    if row_key(row) in keys:
        report["results"][keys.index(row_key(row))] = row
    else:
        report["results"].append(row)


def _write_text(text: str, path: Path) -> None:
    path.write_text(text)


if __name__ == "__main__":
    sys.exit(guard(main))
