"""Time and memory of neighborhood attention, every backend beside the ways one would do without.

Neighborhood attention: https://arxiv.org/abs/2204.07143. All contenders of a setting take turns in
one process, so that whatever else the machine does meets them alike; what counts are the ratios,
each taken within one turn. A turn repeats a short call for ``--turn-ms``, so that it is not the one
that finds the caches as another contender left them: in a model, what attends has just been
computed. A contender whose calls take longer than ``--seconds`` is timed once.

    python tools/benchmark_na.py --threads 1 --output runs/benchmark_na
    python tools/benchmark_na.py --device cuda --dtype bfloat16 --settings 56x56-k7-d64

writes ``<output>.json`` after every row and ``<output>.png`` at the end. A contender that cannot do
a setting, or would need more than ``--max-gib`` of memory for it, or by its time at a smaller batch
more than ``--max-seconds`` for a call, is listed with the reason instead of a time.

The whole sweep takes long. Runs with the same ``--output`` add to one file, so that it can be made
in pieces (``--settings``); a row that is measured again replaces the old one, and ``--resume``
measures only those that are missing:

    python tools/benchmark_na.py --threads 1 --settings 56x56-k7-d32 28x28-k7-d32
    python tools/benchmark_na.py --threads 1 --resume
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import itertools
import json
import logging
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ops.neighborhood import na1d, na2d, na3d

logger = logging.getLogger("benchmark_na")

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]

NUM_HEADS = 4
BASELINE = "tiled"
# The yardstick of the machine: a product of two square matrices of this size.
MATMUL_SIZE = 1024


@dataclass(frozen=True)
class Setting:
    """One shape: the map, the window and the head dim; heads and batch come on top."""

    size: tuple[int, ...]
    kernel_size: tuple[int, ...]
    dim: int
    dilation: int = 1

    @property
    def name(self) -> str:
        size, kernel_size = ("x".join(map(str, v)) for v in (self.size, self.kernel_size))
        if len(set(self.kernel_size)) == 1:
            kernel_size = str(self.kernel_size[0])
        dilated = f"-dilation{self.dilation}" if self.dilation > 1 else ""
        return f"{size}-k{kernel_size}-d{self.dim}{dilated}"

    @property
    def tokens(self) -> int:
        return math.prod(self.size)

    def flops(self, batch: int, backward: bool) -> int:
        """Of the two products forward; of these and the five backward with ``backward``."""
        product = 2 * batch * NUM_HEADS * self.tokens * math.prod(self.kernel_size) * self.dim
        return product * (7 if backward else 2)


SETTINGS = [
    *(Setting((n, n), (7, 7), dim) for n in (56, 28, 14) for dim in (32, 64)),
    Setting((128, 128), (13, 13), 32),
    Setting((64, 64), (7, 7), 32, dilation=4),
    Setting((4096,), (63,), 32),
    Setting((8, 28, 28), (3, 7, 7), 32),
]


class CannotRunError(Exception):
    """A contender cannot do a setting; the message says why."""


def visible(setting: Setting, query: Tensor, key: Tensor) -> Tensor:
    """Whether the query with this flat index sees the key with that one, elementwise."""
    seen = query == query
    for n, k in zip(reversed(setting.size), reversed(setting.kernel_size), strict=True):
        d = setting.dilation
        place, key_place = query % n // d, key % n // d
        group_size = (n - query % n % d + d - 1) // d
        start = torch.minimum((place - k // 2).clamp(min=0), group_size - k)
        seen = seen & (query % n % d == key % n % d)
        seen = seen & (key_place >= start) & (key_place < start + k)
        query, key = query // n, key // n
    return seen


def backend(name: str, setting: Setting) -> Attention:
    """One of ours."""
    attention = (na1d, na2d, na3d)[len(setting.size) - 1]

    def run(query: Tensor, key: Tensor, value: Tensor) -> Any:
        try:
            return attention(
                query, key, value, setting.kernel_size, dilation=setting.dilation, backend=name
            )
        except NotImplementedError as error:
            raise CannotRunError(str(error)) from error

    return run


def masked_sdpa(setting: Setting, device: torch.device) -> Attention:
    """Torch's attention over all pairs with a mask."""
    index = torch.arange(setting.tokens, device=device)
    mask = visible(setting, index[:, None], index)

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, k, v = (t.flatten(1, -3).transpose(1, 2) for t in (query, key, value))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return out.transpose(1, 2).reshape(query.shape)

    return run


def compiled_flex(setting: Setting, device: torch.device) -> Attention:
    """Torch's flex attention, compiled, with the blocks that no query sees left out."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def mask(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return visible(setting, query, key)

    n = setting.tokens
    blocks = create_block_mask(mask, None, None, n, n, device=device.type)
    compiled = torch.compile(flex_attention, dynamic=False)

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if device.type == "cpu" and query.requires_grad:
            raise CannotRunError("flex attention has no backward on the CPU")
        q, k, v = (t.flatten(1, -3).transpose(1, 2) for t in (query, key, value))
        out = compiled(q, k, v, block_mask=blocks)
        return out.transpose(1, 2).reshape(query.shape)

    return run


def contender(name: str, setting: Setting, device: torch.device) -> Attention:
    """The contender of this name, set up for a setting."""
    if name == "sdpa-mask":
        return masked_sdpa(setting, device)
    if name == "flex":
        return compiled_flex(setting, device)
    # The reference gathers the window of every query.
    return backend("reference" if name == "gather" else name, setting)


DTYPES = ("float32", "bfloat16", "float16")
CONTENDERS = ("cpu", "triton", "tiled", "gather", "sdpa-mask", "flex", "natten")


def needed_gib(name: str, setting: Setting, batch: int, device: torch.device) -> float:
    """A lower bound of the memory that a contender needs, where that is much."""
    pairs = batch * NUM_HEADS * setting.tokens**2 * 4
    gathered = setting.tokens * math.prod(setting.kernel_size) * setting.dim
    of_contender = {
        "gather": 2 * batch * NUM_HEADS * gathered * 4,
        "sdpa-mask": 5 * setting.tokens**2,
        # Without kernels NATTEN goes over all pairs.
        "natten": 2 * pairs if device.type == "cpu" else 0,
    }
    return of_contender.get(name, 0) / 2**30


class PeakMemory:
    """Bytes that were held at most during the block, beyond those before it.

    On the GPU what torch allocates; on Linux the resident memory of the process, which counts
    every allocator. Elsewhere ``None``.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bytes: int | None = None

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        elif sys.platform == "linux":
            # Freed memory that the C library keeps would hide what is allocated anew.
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
            self.before = self._status("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            self.bytes = torch.cuda.max_memory_allocated() - self.before
        elif sys.platform == "linux":
            self.bytes = max(0, self._status("VmHWM") - self.before)

    @staticmethod
    def _status(field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        (line,) = (line for line in lines if line.startswith(f"{field}:"))
        return 1024 * int(line.split()[1])


def stopwatch(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def call(attention: Attention, inputs: Sequence[Tensor], grad: Tensor | None) -> None:
    """One forward and, with ``grad``, the backward from it."""
    out = attention(*inputs)
    if grad is not None:
        torch.autograd.grad(out, inputs, grad)


@dataclass(frozen=True)
class Effort:
    """How long to measure: turns of each contender, and limits of time and memory."""

    rounds: int = 15
    seconds: float = 1.0  # that a contender's turns take at most, but for the first 3
    turn_ms: float = 10.0
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
    """Times of all contenders in turn. ``expected`` has seconds of a call, where they are known."""
    shape = (batch, *setting.size, NUM_HEADS, setting.dim)
    generator = torch.Generator(device).manual_seed(0)
    query, key, value, grad = (
        torch.randn(shape, generator=generator, device=device).to(dtype) for _ in range(4)
    )
    inputs = [t.requires_grad_(backward) for t in (query, key, value)]
    matrix = torch.randn(MATMUL_SIZE, MATMUL_SIZE, device=device).to(dtype)
    runs: dict[str, Callable[[], object]] = {"matmul": lambda: matrix @ matrix}
    results: dict[str, dict[str, Any]] = {}
    # By turn; a contender that is too slow to take turns has one, outside of them.
    times: dict[str, list[float]] = {"matmul": []}
    estimates = {"matmul": stopwatch(runs["matmul"], device)}

    for name in names:
        needed = needed_gib(name, setting, batch, device)
        if needed > effort.max_gib:
            results[name] = {"skipped": f"needs {needed:.1f} GiB or more"}
            continue
        if expected.get(name, 0.0) > effort.max_seconds:
            seconds = expected[name]
            results[name] = {"skipped": f"about {seconds:.0f} s a call, by that of a smaller batch"}
            continue
        try:
            attention = contender(name, setting, device)
            run = functools.partial(call, attention, inputs, grad if backward else None)
            for attempt in range(2):
                with PeakMemory(device) as memory:
                    estimates[name] = stopwatch(run, device)
                # The first call of flex attention compiles.
                if estimates[name] > effort.seconds and (attempt or name != "flex"):
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

    for turn in range(effort.rounds):
        for name, run in runs.items():
            if turn >= 3 and turn * max(estimates[name], effort.turn_ms / 1e3) > effort.seconds:
                continue
            repeats = max(1, math.ceil(effort.turn_ms / 1e3 / estimates[name]))

            def repeated(run: Callable[[], object] = run, repeats: int = repeats) -> None:
                for _ in range(repeats):
                    run()

            times[name].append(stopwatch(repeated, device) / repeats)

    flops = setting.flops(batch, backward)
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
            # A turn that one of both left out has no ratio.
            ratios = [base / own for base, own in zip(times[BASELINE], of_name, strict=False)]
            if name not in runs:
                ratios = [statistics.median(times[BASELINE]) / median]
            results[name]["speedup_over_tiled"] = statistics.median(ratios)
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
    report: dict[str, Any], setting: Setting, batch: int, dtype: str, backward: bool
) -> dict[str, float]:
    """Seconds of a call by contender, from the same one at the largest smaller batch."""
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


def processor_name() -> str:
    """What the processor calls itself, with its number of cores."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        model = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
        name = next(model, name)
    return f"{name}, {os.cpu_count()} cores"


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures depend on."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else processor_name()
    return {
        "device": device.type,
        "name": name,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def row_key(row: dict[str, Any]) -> tuple[str, int, str, bool]:
    """What a row measures."""
    return row["setting"], row["batch"], row["dtype"], row["backward"]


def load_report(path: Path, current: dict[str, Any]) -> dict[str, Any]:
    """The report of earlier runs into ``path``, or an empty one.

    Raises:
        ValueError: if they ran on another machine, or not as this one does.
    """
    if not path.exists():
        return {"machine": current, "results": []}
    report: dict[str, Any] = json.loads(path.read_text())
    if report["machine"] != current:
        raise ValueError(
            f"{path} was measured on {report['machine']}, this is {current}; choose another "
            "--output, or delete it"
        )
    return report


def add_row(report: dict[str, Any], row: dict[str, Any]) -> None:
    """Put a row in its place, in the order of the settings, instead of an older one."""
    order = [setting.name for setting in SETTINGS]
    others = [other for other in report["results"] if row_key(other) != row_key(row)]

    def place(row: dict[str, Any]) -> tuple[int, int, int, bool]:
        name, batch, dtype, backward = row_key(row)
        return order.index(name), batch, DTYPES.index(dtype), backward

    report["results"] = sorted([*others, row], key=place)


def write(path: Path, save: Callable[[Path], object]) -> None:
    """Write a file under another name first, so that it is never seen half-written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{os.getpid()}-{path.name}")
    save(unfinished)
    unfinished.replace(path)


def draw(report: dict[str, Any], path: Path) -> None:
    """Bars of the speed over the tiled backend, a panel for each dtype, batch and direction."""
    from matplotlib.figure import Figure

    panels: dict[tuple, list[dict]] = {}
    for row in report["results"]:
        panels.setdefault((row["dtype"], row["batch"], row["backward"]), []).append(row)
    figure = Figure(figsize=(12, 3.2 * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    timed = (
        name
        for row in report["results"]
        for name, result in row["contenders"].items()
        if "speedup_over_tiled" in result and name != BASELINE
    )
    names = list(dict.fromkeys(timed))
    for axis, ((dtype, batch, backward), rows) in zip(axes, panels.items(), strict=True):
        for i, name in enumerate(names):
            speedups = [row["contenders"][name].get("speedup_over_tiled", math.nan) for row in rows]
            offset = (i - (len(names) - 1) / 2) / (len(names) + 1)
            places = [place + offset for place in range(len(rows))]
            # From 1 upwards where faster than tiled, downwards where slower.
            heights = [speedup - 1 for speedup in speedups]
            axis.bar(places, heights, 1 / (len(names) + 1), bottom=1, label=name)
        axis.set_yscale("log")
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_xticks(range(len(rows)), [row["setting"] for row in rows], fontsize=7)
        direction = "forward and backward" if backward else "forward"
        axis.set_title(f"{direction}, {dtype}, batch {batch}", fontsize=9)
        axis.set_ylabel("speed over tiled", fontsize=8)
    if names:
        axes[0].legend(ncols=len(names), fontsize=7)
    figure.savefig(path, format="png", dpi=120)


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
    parser.add_argument("--rounds", type=int, default=effort.rounds, help="turns of a contender")
    parser.add_argument(
        "--seconds",
        type=float,
        default=effort.seconds,
        help="stop a contender's turns after, but after 3 of them at least",
    )
    parser.add_argument(
        "--turn-ms", type=float, default=effort.turn_ms, help="repeat shorter calls for a turn"
    )
    parser.add_argument(
        "--max-seconds",
        type=float,
        default=effort.max_seconds,
        help="leave out what takes longer for a call, by its time at a smaller batch",
    )
    parser.add_argument(
        "--max-gib", type=float, default=effort.max_gib, help="leave out what needs more memory"
    )
    parser.add_argument(
        "--resume", action="store_true", help="leave out what the output already holds"
    )
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark_na"))
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    output = args.output.with_suffix(".json")
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
    """One line on a contender."""
    if "skipped" in result:
        return f"left out: {result['skipped']}"
    peak = result["peak_bytes"]
    memory = "" if peak is None else f"  {peak / 2**20:8.1f} MiB"
    speedup = result.get("speedup_over_tiled")
    ratio = "" if speedup is None else f"  {speedup:6.2f}× tiled"
    return f"{result['milliseconds']:9.2f} ms  {result['gflops']:7.1f} GFLOP/s{ratio}{memory}"


if __name__ == "__main__":
    main()
