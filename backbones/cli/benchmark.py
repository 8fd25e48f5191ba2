"""``vision-backbones benchmark``: models plain, fused and compiled, and other implementations.

Compare the ratios: contenders of a row take turns in one process, so that other load affects them
equally. After half of the turns, all models are created again in reverse order.

With the name of a model, the row of the page "Speed" is measured on this machine: eager in both
memory formats, compiled, those of ONNX Runtime and OpenVINO that are installed, and fused in
float32, bfloat16 and int8.

The mode int8 has a range for each row of inputs, int8_calibrated ranges from four random batches;
all others are in the row's dtype or, with ``+bfloat16``, in bfloat16. ``--against`` also names a
module or a Python file with a function ``create_model(name)``, which returns its model for our
name, or None if it has none. The label in the report is the module's or file's name, here
``original``:

    import sys

    sys.path.append("/where/the/authors/code/lies")

    def create_model(name):
        if name == "van_b0":
            from models.van import van_b0
            return van_b0()
        return None

Writes ``<output>.json`` after every row. Runs with the same ``--output`` extend the same report: a
repeated row replaces the old one, and ``--resume`` measures only missing rows. ``--profile`` adds
the time that the plain and the fused model spend in kinds of operators.
"""

from __future__ import annotations

import functools
import gc
import itertools
import logging
import math
import statistics
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import backbones
from backbones.cli import graphs
from backbones.cli.benchmark_report import describe, speed_lines
from backbones.cli.contenders import MODELS, CannotRunError, Create, Runtime, contender, reason
from backbones.cli.measure import count_macs
from backbones.cli.reports import load_report, provenance, put_rows, write_report
from backbones.cli.timing import MATMUL_FLOPS, PeakMemory, machine, matmul, steady, time_by_kind
from backbones.common.arguments import THREADS, nonempty_path, real, whole
from backbones.common.errors import CommandError
from backbones.common.messages import shown
from backbones.common.outputs import REPORT, add_overwrite, require_writable
from backbones.core.inputs import require_size, size_of
from backbones.core.registry import PREFIX
from backbones.core.requirements import installed_version
from ops.fuse.calls import CALLS_TO_REPLAY
from ops.fuse.replayed import Replayed

EXAMPLE = "--models unireplknet_a van_b0 --modes eager fused --threads 1 2"

logger = logging.getLogger(__name__)

FLOAT_MODES = ("eager", "channels_last", "fused", "compile", "fused+compile")
INT8 = ("int8", "int8_calibrated")
LOW_PRECISION = "+bfloat16"
# What all others are compared with, beside the other libraries.
BASES = ("eager", "channels_last", *INT8)
DTYPES = ("float32", "bfloat16")
DEFAULT_MODELS = (
    *("efficientvit_m5", "shvit_s4", "inception_next_tiny", "unireplknet_a", "unireplknet_t"),
    *("van_b0", "biformer_tiny", "litv2_s", "favit_b0", "ravlt_t", "medvitv2_tiny", "hat_s_x2"),
)
# Restoration works on tiles.
DEFAULT_SIZE, DEFAULT_TILE = 224, 64


class Row(NamedTuple):
    """One model at one size, batch, number of threads, dtype and direction."""

    model: str
    size: int
    batch: int
    threads: int
    dtype: str
    direction: str

    def images(self) -> Tensor:
        return graphs.noise((self.batch, 3, self.size, self.size), 0)

    def run(self, model: nn.Module, images: Tensor) -> Callable[[], Tensor]:
        """The timed function: a forward pass, or a training step with plain gradient descent."""
        if self.direction == "forward":
            return functools.partial(_forward, model, images)
        layers: list[Any] = list(model.modules())
        for layer in layers:  # stochastic depth depends on the recipe, and defaults differ
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
    if mode in INT8:
        batches = [*random_batches(row.images().shape)] if mode == "int8_calibrated" else None
        backbones.fuse(model, dtype=torch.int8, calibrate=batches)
        return model
    model.to(dtype)
    if mode.startswith("channels_last"):
        model.to(memory_format=torch.channels_last)
    return torch.compile(model) if "compile" in mode else model  # type: ignore[return-value]


def random_batches(shape: Sequence[int]) -> Tensor:
    """Four batches of a shape to calibrate with: the ranges do not change the time."""
    return graphs.noise((4, *shape), 1)


def _bytes_on_disk(model: Any) -> int | None:
    """The size of another runtime's file, or of our saved weights."""
    if isinstance(model, Runtime):
        return model.bytes_on_disk
    precision = getattr(model, "precision", None)
    in_int8 = precision is not None and precision.quantized
    state = model.int8_state_dict() if in_int8 else model.state_dict()
    return sum(tensor.nbytes for tensor in state.values())


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
    max_seconds: float = math.inf,
) -> dict[str, Any]:
    """Times of all contenders in alternating turns: ``rounds``, or as many as fit in ``seconds``.

    A turn repeats the call for ``turn_seconds``, see :func:`backbones.cli.timing.steady`. What
    takes more than ``max_seconds`` in its second call is left out.
    """
    torch.set_num_threads(row.threads)
    images = row.images()
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
                    continue
                dtype = next(model.parameters()).dtype if name in INT8 else dtype_of(name, row)
                run = row.run(model, images.to(dtype))
                start = time.perf_counter()
                for _ in range(CALLS_TO_REPLAY if isinstance(model, Replayed) else 1):
                    outputs[name] = run().float()  # compiles, packs weights
                warm_up = time.perf_counter() - start
                start = time.perf_counter()
                with PeakMemory(images.device) as memory:
                    run()
                if (taken := time.perf_counter() - start) > max_seconds:
                    raise CannotRunError(f"a call takes {taken:.3g} s")
            except (RuntimeError, ImportError, NotImplementedError, TypeError, ValueError) as error:
                results[name] = {"skipped": reason(error)}
                turns.pop(name, None)
            else:
                runs[name] = run
                results[name] = {"peak_bytes": memory.bytes, "warm_up_seconds": warm_up}
                results[name]["bytes"] = _bytes_on_disk(model)
        yardsticks = {str(dtype_of(name, row)).removeprefix("torch.") for name in runs}
        runs |= {dtype: matmul(getattr(torch, dtype)) for dtype in sorted(yardsticks)}
        deadline = time.perf_counter() + seconds / 2
        for turn in range(part):
            if turn >= 2 and time.perf_counter() > deadline:
                break
            for name, timed in runs.items():
                turns.setdefault(name, []).append(steady(timed, images.device, turn_seconds))

    height, width = images.shape[2:]
    macs = count_macs(backbones.create_model(row.model), height, width)
    medians = {name: list(map(statistics.median, of_name)) for name, of_name in turns.items()}
    peaks = {dtype: MATMUL_FLOPS / statistics.median(medians.pop(dtype)) for dtype in yardsticks}
    passes = 1 if row.direction == "forward" else 3
    for name, of_name in medians.items():
        peak = peaks[str(dtype_of(name, row)).removeprefix("torch.")]
        flops = 2 * macs * row.batch * passes
        results[name].update(_figures(sum(turns[name], []), row.batch, flops, peak))
        results[name]["speedup_over"] = {
            other: statistics.median(b / a for a, b in zip(of_name, medians[other], strict=True))
            for other in medians
            if other != name and (other in BASES or other in peers)
        }
        if name in modes and name != "eager" and "eager" in medians and row.direction == "forward":
            difference = graphs.difference(outputs[name], outputs["eager"])
            results[name]["difference_from_eager"] = difference
        if profile and name in ("eager", "fused", "fused" + LOW_PRECISION):
            results[name]["time_by_kind"] = time_by_kind(runs[name])
    gflops = {dtype: peak / 1e9 for dtype, peak in peaks.items()}
    facts = {"macs": macs, "matmul_gflops": gflops, "orders": min(rounds, 2)}
    words = [word for label in peers for word in label.split("_") if word]
    facts["versions"] = {word: found for word in words if (found := installed_version(word))}
    return {**row._asdict(), **facts, **provenance(), "contenders": results}


def _figures(times: list[float], batch: int, flops: float, peak: float) -> dict[str, Any]:
    median = statistics.median(times)
    fastest, p90, p99 = 1e3 * np.quantile(times, (0, 0.9, 0.99), method="inverted_cdf")
    return {
        "milliseconds": 1e3 * median,
        "fastest": fastest,
        "p90": p90,
        "p99": p99,
        "images_per_second": batch / median,
        "gflops": flops / median / 1e9,
        "fraction_of_matmul": flops / median / peak,
        "calls": len(times),
    }


def add_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("model", nargs="?", metavar="MODEL", help="model to measure as on the page Speed")
    add("--models", nargs="+", metavar="NAME", help="several models, with --modes and --against")
    sizes = "default 224, for HAT 64, for timm's its own"
    add("--sizes", nargs="+", type=whole(1, 65535), metavar="N", help=sizes)
    add("--batches", nargs="+", type=whole(1), metavar="N", help="default 1 and 8, of MODEL 1")
    add("--threads", nargs="+", type=THREADS, default=[1], metavar="N")
    add("--dtypes", nargs="+", default=["float32"], choices=DTYPES)
    modes = [*FLOAT_MODES, *INT8, *(mode + LOW_PRECISION for mode in FLOAT_MODES)]
    text = f"of {', '.join(FLOAT_MODES)} (each also with {LOW_PRECISION}), {', '.join(INT8)}"
    add("--modes", nargs="+", choices=modes, metavar="MODE", help=text)
    add("--directions", nargs="+", default=["forward"], choices=["forward", "train"])
    text = f"of {', '.join(MODELS)}, or a module or file with create_model(name)"
    add("--against", nargs="*", metavar="PACKAGE", help=text)
    add("--rounds", type=whole(1), default=9, metavar="N", help="turns per implementation")
    add("--seconds", type=real(0), default=60, metavar="S", help="stop a row's turns after")
    add("--turn-ms", type=real(0), default=300.0, metavar="MS", help="duration of a turn")
    text = "skip implementations whose calls take longer"
    add("--max-seconds", type=real(0), default=math.inf, metavar="S", help=text)
    add("--profile", action="store_true", help="also profile by kind of operator")
    add("--resume", action="store_true", help="skip rows that the output already has")
    add("--output", type=nonempty_path, default=Path("runs/benchmark"))
    add_overwrite(parser)


def run(options: Namespace, known: Mapping[str, Create] = MODELS) -> int:
    """Run ``benchmark``, where ``--against`` may name the ``known``."""
    _set_defaults(options)
    output = options.output.with_suffix(".json")
    written = {"--output": (output, REPORT)}
    require_writable(written, overwrite=options.overwrite, makes_folders=True)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        sizes = {name: _sizes(name, options.sizes) for name in options.models}
    except ValueError as error:
        raise CommandError(str(error)) from error
    peers = dict(contender(name, known) for name in options.against)
    here = {key: value for key, value in machine(torch.device("cpu")).items() if key != "threads"}
    report = load_report(output, here)
    there = report["results"] if options.resume else []
    done = {tuple(row[name] for name in Row._fields) for row in there}
    settings = (options.threads, options.dtypes, options.directions, options.batches)
    rows = [
        Row(name, size, batch, threads, dtype, direction)
        for threads, dtype, direction, batch, name in itertools.product(*settings, options.models)
        for size in sizes[name]
    ]
    for row in rows:
        if row in done:
            continue
        turns = (options.rounds, options.seconds, options.turn_ms / 1e3)
        found = measure(row, options.modes, peers, *turns, options.profile, options.max_seconds)
        put_rows(report, [found], Row._fields)
        logger.info("%s", " ".join(f"{k} {v}" for k, v in row._asdict().items()))
        for label, figures in found["contenders"].items():
            logger.info("    %-18s %s", label, describe(figures))
        write_report(output, report)
        torch._dynamo.reset()
        gc.collect()
    logger.info("\n%s\n", "\n".join(speed_lines(report)))
    return 0


# The row of one model.
_ROW_MODES = ("eager", "channels_last", "compile", "fused", "fused+bfloat16", "int8")
_ROW_PEERS = ("onnxruntime", "openvino", "openvino_bf16")


def _set_defaults(options: Namespace) -> None:
    """Fill in defaults, which depend on whether a single model was named."""
    one = options.model is not None
    if one and options.models:
        raise CommandError(f"give either {options.model!r} or --models, not both")
    peers = [name for name in _ROW_PEERS if installed_version(name.split("_")[0])]
    defaults: dict[str, tuple[list[Any], list[Any]]] = {
        "models": ([options.model], list(DEFAULT_MODELS)),
        "batches": ([1], [1, 8]),
        "modes": ([*_ROW_MODES], ["eager", "fused"]),
        "against": (peers, ["timm"]),
    }
    for name, (of_one, of_many) in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, of_one if one else of_many)


def _sizes(name: str, sizes: Sequence[int] | None) -> Sequence[int]:
    """The sizes to measure a model at: ``sizes``, or else its usual one."""
    if not name.startswith(PREFIX):
        if name not in backbones.list_models():
            raise ValueError(f"unknown model {shown(name)}; see backbones.list_models()")
        return sizes or [DEFAULT_TILE if name.startswith("hat") else DEFAULT_SIZE]
    model = backbones.create_model(name)
    require_size(model, *((size, size) for size in sizes or ()))
    return sizes or [size_of(model)[0]]
