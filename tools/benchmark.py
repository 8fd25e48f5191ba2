"""Time and memory of the models: plain, fused and compiled, beside timm, peers and originals.

All contenders of a row take turns in one process, so that whatever else the machine does meets them
alike; what counts are the ratios, each taken within one turn.

    python tools/benchmark.py --models unireplknet_a van_b0 --batches 1 8 --threads 1 2
    python tools/benchmark.py --models shvit_s4 --against birder ~/originals.py --dtypes bfloat16
    python tools/benchmark.py --models ravlt_t --sizes 224 384 512 768 1024 --modes eager fused
    python tools/benchmark.py --compare runs/benchmark.json --output runs/benchmark_new

``--against`` names an importable module or a Python file with a function ``create_model(name)``,
which returns its model of our name, or None where it has none; ``timm`` and ``birder`` are known.

Writes ``<output>.json`` after every row, and ``<output>.md`` and ``<output>.png`` at the end. MACs
are those that torch's counter sees, which knows no compiled kernels of ours.
"""

from __future__ import annotations

import argparse
import functools
import gc
import importlib
import importlib.util
import itertools
import json
import logging
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from benchmark_na import PeakMemory, machine, stopwatch, write
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import backbones

logger = logging.getLogger("benchmark")

MODES = ("eager", "fused", "compile", "fused+compile")
DTYPES = ("float32", "bfloat16")
MODELS = (
    *("efficientvit_m5", "shvit_s4", "inception_next_tiny", "unireplknet_a", "unireplknet_t"),
    *("van_b0", "biformer_tiny", "litv2_s", "favit_b0", "ravlt_t", "medvitv2_tiny", "hat_s_x2"),
)
# Restoration works on tiles.
DEFAULT_SIZE, DEFAULT_TILE = 224, 64
# The yardstick of the machine: a product of two square matrices of this size.
MATMUL_SIZE = 1024
BIRDER_NAMES = {
    **{f"efficientvit_m{i}": f"efficientvit_msft_m{i}" for i in range(6)},
    **{f"inception_next_{a}": f"inception_next_{a[0]}" for a in ("atto", "tiny", "small", "base")},
    **{f"biformer_{a}": f"biformer_{a[0]}" for a in ("tiny", "small", "base")},
    **{f"litv2_{a}": f"lit_v2_{a}" for a in ("s", "m", "b")},
}

Create = Callable[[str], nn.Module | None]


def create_timm(name: str) -> nn.Module | None:
    """timm's own model of that name, not one that it has from us."""
    model_class = timm.models.model_entrypoint(name) if timm.models.is_model(name) else None
    if model_class is None or not model_class.__module__.startswith("timm."):
        return None
    return timm.create_model(name)


def create_birder(name: str) -> nn.Module | None:
    """The model of the library ``birder``, https://pypi.org/project/birder."""
    from birder.model_registry import registry

    theirs = BIRDER_NAMES.get(name, name)
    if theirs not in registry.list_models():
        return None
    return registry.net_factory(theirs, 1000)


def peer(name: str) -> tuple[str, Create]:
    """Label and factory of what ``--against`` names.

    Raises:
        ValueError: no such module or file, or one without ``create_model``.
    """
    known: dict[str, Create] = {"timm": create_timm, "birder": create_birder}
    if name in known:
        return name, known[name]
    if name.endswith(".py"):
        path = Path(name).expanduser()
        if not path.is_file():
            raise ValueError(f"--against: there is no file {path}")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        label = path.stem
    else:
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError as error:
            raise ValueError(f"--against: {error}") from error
        label = name
    if not hasattr(module, "create_model"):
        raise ValueError(f"--against: {name} has no function create_model(name)")
    return label, module.create_model


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

    def run(self, model: nn.Module, images: Tensor) -> Callable[[], object]:
        """What is timed: a forward pass, or a training step by plain gradient descent."""
        if self.direction == "forward":
            return functools.partial(_forward, model, images)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-9)
        return functools.partial(_step, model, images, optimizer)


def _forward(model: nn.Module, images: Tensor) -> Tensor:
    with torch.inference_mode():
        return model(images)


def _step(model: nn.Module, images: Tensor, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    out = model(images)
    out = out[0] if isinstance(out, tuple) else out
    out.float().square().mean().backward()
    optimizer.step()


def _ours(name: str, mode: str, row: Row) -> nn.Module:
    torch.manual_seed(0)
    model = backbones.create_model(name).train(row.direction == "train")
    dtype = getattr(torch, row.dtype)
    if mode.startswith("fused"):
        model.fuse(dtype=dtype)
    model.to(dtype)
    return torch.compile(model) if mode.endswith("compile") else model


def _theirs(create: Create, row: Row) -> nn.Module | None:
    torch.manual_seed(0)
    model = create(row.model)
    if model is None:
        return None
    return model.train(row.direction == "train").to(getattr(torch, row.dtype))


def count_macs(row: Row) -> float:
    """Multiply-accumulates of one image forward."""
    model = backbones.create_model(row.model).eval()
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model(row.images(1))
    return counter.get_total_flops() / 2


def measure(
    row: Row, modes: Sequence[str], peers: dict[str, Create], rounds: int, seconds: float
) -> dict[str, Any]:
    """Times of all contenders in turn: ``rounds`` turns, or in ``seconds``, but 3 at least."""
    torch.set_num_threads(row.threads)
    images = row.images(row.batch).to(getattr(torch, row.dtype))
    makers: dict[str, Callable[[], nn.Module | None]] = {
        mode: functools.partial(_ours, row.model, mode, row)
        for mode in modes
        if row.direction == "forward" or not mode.startswith("fused")
    }
    makers |= {label: functools.partial(_theirs, create, row) for label, create in peers.items()}
    runs: dict[str, Callable[[], object]] = {}
    results: dict[str, dict[str, Any]] = {}
    outputs: dict[str, Tensor] = {}
    for name, make in makers.items():
        start = time.perf_counter()
        try:
            model = make()
            if model is None:
                continue
            run = row.run(model, images)
            out = run()  # compiles, packs weights
            run()
            warm_up = time.perf_counter() - start
            with PeakMemory(torch.device("cpu")) as memory:
                run()
        except (RuntimeError, ImportError, NotImplementedError, TypeError, ValueError) as error:
            results[name] = {"skipped": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
            continue
        if isinstance(out, Tensor):
            outputs[name] = out.float()
        runs[name] = run
        results[name] = {"peak_bytes": memory.bytes, "warm_up_seconds": warm_up}

    matrix = torch.randn(MATMUL_SIZE, MATMUL_SIZE).to(images.dtype)
    runs["matmul"] = lambda: matrix @ matrix
    times: dict[str, list[float]] = {name: [] for name in runs}
    deadline = time.perf_counter() + seconds
    for turn in range(rounds):
        if turn >= 3 and time.perf_counter() > deadline:
            break
        for name, timed in runs.items():
            times[name].append(stopwatch(timed, images.device))

    macs = count_macs(row)
    peak = 2 * MATMUL_SIZE**3 / statistics.median(times.pop("matmul"))
    passes = 1 if row.direction == "forward" else 3
    for name, of_name in times.items():
        results[name].update(_figures(of_name, row.batch, 2 * macs * row.batch * passes, peak))
        results[name]["speedup_over"] = {
            other: statistics.median(b / a for a, b in zip(of_name, times[other], strict=True))
            for other in times
            if other != name and (other == "eager" or other in peers)
        }
        if name in MODES and name != "eager" and {name, "eager"} <= outputs.keys():
            exact = outputs["eager"]
            error = (outputs[name] - exact).abs().max() / exact.abs().max()
            results[name]["difference_from_eager"] = error.item()
    return {**row.key, "macs": macs, "matmul_gflops": peak / 1e9, "contenders": results}


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
        "rounds": len(times),
    }


def table(report: dict[str, Any]) -> str:
    """All rows in Markdown: ms, and how many times longer the eager model and the peers took."""
    m = report["machine"]
    lines = [
        f"{m['name']} ({m['cpu_capability']}), torch {m['torch']}; medians of interleaved runs.",
        "",
        "| Model | size | batch | threads | dtype | | what | ms | p90 | images/s | of matmul | "
        "memory, MiB | times faster than |",
        "|---|---:|---:|---:|---|---|---|---:|---:|---:|---:|---:|---|",
    ]
    for row in report["results"]:
        place = "| {model} | {size} | {batch} | {threads} | {dtype} | {direction} ".format(**row)
        for name, figures in row["contenders"].items():
            if "skipped" in figures:
                lines.append(f"{place}| {name} | left out: {figures['skipped'][:80]} |||||")
                continue
            over = ", ".join(f"{k} {v:.2f}" for k, v in figures["speedup_over"].items())
            memory = "–" if figures["peak_bytes"] is None else f"{figures['peak_bytes'] >> 20}"
            lines.append(
                f"{place}| {name} | {figures['milliseconds']:.1f} | {figures['p90']:.1f} | "
                f"{figures['images_per_second']:.1f} | {100 * figures['fraction_of_matmul']:.0f} % "
                f"| {memory} | {over} |"
            )
    return "\n".join([*lines, *scaling(report)]) + "\n"


def scaling(report: dict[str, Any]) -> list[str]:
    """How times grow with pixels, where a model was measured at several sizes."""
    lines = []
    for key, sizes in _by_size(report).items():
        (first, start), *_, (last, end) = sorted(sizes.items())
        power = math.log(end / start) / (2 * math.log(last / first))
        label = ", ".join(map(str, key))
        lines.append(f"- {label}: from {first} to {last} time grows as pixels to the {power:.2f}")
    return ["", "Growth with resolution:", "", *lines] if lines else []


def _by_size(report: dict[str, Any]) -> dict[tuple[Any, ...], dict[int, float]]:
    """(model, contender, …) → size → ms, where there are two sizes or more."""
    series: dict[tuple[Any, ...], dict[int, float]] = {}
    for row in report["results"]:
        for name, figures in row["contenders"].items():
            if "milliseconds" in figures:
                parts = ("batch", "threads", "dtype", "direction")
                key = (row["model"], name, *(f"{part} {row[part]}" for part in parts))
                series.setdefault(key, {})[row["size"]] = figures["milliseconds"]
    return {key: sizes for key, sizes in series.items() if len(sizes) > 1}


def comparison(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """A line for each time that both reports have: how many times faster the new one is."""
    keys = ("model", "size", "batch", "threads", "dtype", "direction")
    before = {tuple(row[k] for k in keys): row["contenders"] for row in old["results"]}
    lines = []
    for row in new["results"]:
        key = tuple(row[k] for k in keys)
        for name, figures in row["contenders"].items():
            was = before.get(key, {}).get(name, {}).get("milliseconds")
            if was is not None and "milliseconds" in figures:
                now = figures["milliseconds"]
                place = " ".join(map(str, key))
                lines.append(f"{place} {name}: {was:.1f} → {now:.1f} ms, {was / now:.2f}×")
    return lines


def draw(report: dict[str, Any], path: Path) -> None:
    """Bars of the speed over eager, a panel for each setting; curves over size where there are."""
    from matplotlib.figure import Figure

    panels: dict[str, list[dict[str, Any]]] = {}
    for row in report["results"]:
        title = "{size}², batch {batch}, {threads} thread(s), {dtype}, {direction}".format(**row)
        panels.setdefault(title, []).append(row)
    curves = _by_size(report)
    count = len(panels) + bool(curves)
    figure = Figure(figsize=(11, 3 * count), layout="constrained")
    axes = figure.subplots(count, 1, squeeze=False)[:, 0]
    for axis, (title, rows) in zip(axes, panels.items(), strict=False):
        names = list(dict.fromkeys(name for row in rows for name in row["contenders"]))
        names = [name for name in names if name != "eager"]
        for i, name in enumerate(names):
            speeds = [_speed(row["contenders"], name) for row in rows]
            places = [j + (i - (len(names) - 1) / 2) / (len(names) + 1) for j in range(len(rows))]
            axis.bar(places, speeds, 1 / (len(names) + 1), label=name)
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_xticks(range(len(rows)), [row["model"] for row in rows], fontsize=7)
        axis.set_title(title, fontsize=9)
        axis.set_ylabel("speed over eager", fontsize=8)
        axis.legend(ncols=max(1, len(names)), fontsize=7)
    if curves:
        for key, sizes in curves.items():
            pixels = [size**2 for size in sorted(sizes)]
            axes[-1].plot(pixels, [sizes[s] for s in sorted(sizes)], "o-", label=" ".join(key[:2]))
        axes[-1].set(xscale="log", yscale="log", xlabel="pixels", ylabel="ms")
        axes[-1].legend(fontsize=6)
    figure.savefig(path, format="png", dpi=120)


def _speed(contenders: dict[str, dict[str, Any]], name: str) -> float:
    return contenders.get(name, {}).get("speedup_over", {}).get("eager", math.nan)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=list(MODELS), metavar="NAME")
    parser.add_argument("--sizes", nargs="+", type=int, help="default 224, for HAT 64")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--threads", nargs="+", type=int, default=[1])
    parser.add_argument("--dtypes", nargs="+", default=["float32"], choices=DTYPES)
    parser.add_argument("--modes", nargs="+", default=["eager", "fused"], choices=MODES)
    parser.add_argument(
        "--directions", nargs="+", default=["forward"], choices=["forward", "train"]
    )
    parser.add_argument("--against", nargs="+", default=["timm"], metavar="PACKAGE_OR_FILE")
    parser.add_argument("--rounds", type=int, default=15, help="turns of every contender")
    parser.add_argument("--seconds", type=float, default=60, help="stop a row's turns after")
    parser.add_argument("--compare", type=Path, metavar="OLD.json", help="an earlier report")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark"))
    args = parser.parse_args(arguments)
    unknown = set(args.models) - set(backbones.list_models())
    if unknown:
        parser.error(f"unknown models {', '.join(sorted(unknown))}; see backbones.list_models()")
    if args.compare is not None and not args.compare.is_file():
        parser.error(f"--compare: there is no file {args.compare}")
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    # Read before it may be written over.
    old = None if args.compare is None else json.loads(args.compare.read_text())
    peers = dict(peer(name) for name in args.against)
    report: dict[str, Any] = {"machine": machine(torch.device("cpu")), "results": []}
    settings = itertools.product(args.threads, args.dtypes, args.directions, args.batches)
    for (threads, dtype, direction, batch), name in itertools.product(settings, args.models):
        tile = name.startswith("hat")
        for size in args.sizes or [DEFAULT_TILE if tile else DEFAULT_SIZE]:
            row = Row(name, size, batch, threads, dtype, direction)
            measured = measure(row, args.modes, peers, args.rounds, args.seconds)
            report["results"].append(measured)
            logger.info("%s", " ".join(f"{k} {v}" for k, v in row.key.items()))
            for contender, figures in measured["contenders"].items():
                logger.info("    %-14s %s", contender, describe(figures))
            text = json.dumps(report, indent=1)
            write(args.output.with_suffix(".json"), functools.partial(_write_text, text))
            torch._dynamo.reset()
            gc.collect()
    write(args.output.with_suffix(".md"), functools.partial(_write_text, table(report)))
    write(args.output.with_suffix(".png"), functools.partial(draw, report))
    if old is not None:
        for line in comparison(old, report):
            logger.info("%s", line)


def _write_text(text: str, path: Path) -> None:
    path.write_text(text)


def describe(figures: dict[str, Any]) -> str:
    """One line on a contender."""
    if "skipped" in figures:
        return f"left out: {figures['skipped']}"
    over = "  ".join(f"{v:5.2f}× {k}" for k, v in figures["speedup_over"].items())
    return f"{figures['milliseconds']:9.2f} ms  {figures['gflops']:7.1f} GFLOP/s  {over}"


if __name__ == "__main__":
    main()
