"""Compare models fused in 8 bits with those of other toolkits: time, size, agreement.

    python tools/int8_peers.py agreement --checkpoints runs/digits --resume
    python tools/int8_peers.py speed --models shvit_s4 --batches 1 --threads 1 --resume

Requires ``pip install nncf openvino onnx onnxscript onnxruntime torchao`` and a C++ compiler for
``torch.compile``; see ``int8_contenders.py`` for how each toolkit quantises. One that fails has its
error in the report.

``speed`` measures untrained models on random images, all contenders alternately in one process, as
``benchmark.py`` does. ``agreement`` compares predictions of the classifiers that
``int8_accuracy.py`` trains with those in float32, on all validation images, one at a time; every
contender is calibrated with the same training images. Each row is written to ``--output`` as soon
as it is measured, and replaces an older one; ``--resume`` measures only missing rows.
``tools/performance_page.py`` writes the page.
"""

from __future__ import annotations

import copy
import functools
import gc
import itertools
import logging
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from benchmark import Row, describe
from benchmark import measure as measure_speed
from int8_accuracy import compare, here, predict
from int8_contenders import PACKAGES, TOOLKITS, Contender, Run, fused
from measuring import load_report, replace_results
from torch import Tensor, nn
from trained_runs import CLASSIFIERS, digits_run

import backbones
from backbones.common.arguments import THREADS, nonempty_path, real, whole
from backbones.common.console import Parser, guard
from backbones.common.errors import CommandError
from backbones.common.outputs import REPORT, require_writable
from backbones.core.messages import first_line

__all__ = ["KEYS", "OURS", "Contenders", "main", "of_agreement", "of_speed"]

logger = logging.getLogger("int8_peers")

OUTPUT = Path(__file__).resolve().parent.parent / "docs" / "performance" / "int8_peers.json"
MODELS = (
    *("shvit_s4", "inception_next_tiny", "shvit_s1", "van_b0", "efficientvit_m5"),
    *("unireplknet_a", "vig_t", "nat_mini"),
)
MODES = ("fused", "fused+bfloat16")
KEYS = ("part", "model", "batch", "threads")
SIZE = 224
_CALIBRATION = 4  # random batches; the ranges do not change the time

OURS: dict[str, Callable[[nn.Module, Sequence[Tensor]], Contender]] = {
    "fused": lambda model, _: fused(model),
    "fused+bfloat16": lambda model, _: fused(model, torch.bfloat16),
    "int8": lambda model, _: fused(model, torch.int8),
    "int8_calibrated": lambda model, images: fused(model, torch.int8, images),
}
"""By label. ``speed`` has ``benchmark.py`` create the first two."""


class Contenders:
    """All contenders for a model in float32, quantised when first needed.

    Args:
        model: in eval mode.
        images: batches to calibrate with, of the shape that will be run.
        toolkits: labels of :data:`TOOLKITS`.
        folder: for files.
    """

    def __init__(
        self, model: nn.Module, images: Sequence[Tensor], toolkits: Sequence[str], folder: Path
    ) -> None:
        self.model, self.images, self.folder = model, images, folder
        self.labels = [*OURS, *toolkits]
        self.sizes: dict[str, int] = {}
        self._quantized: dict[str, Contender | RuntimeError] = {}

    def start(self, label: str, threads: int) -> Run:
        """A function that runs a contender: (B, C, H, W) → output.

        Raises:
            RuntimeError: the contender cannot be made, with the toolkit's reason.
        """
        if label in OURS:  # anew, for memory of its own
            contender = OURS[label](self.model, self.images)
        else:
            contender = self._by_toolkit(label)
        self.sizes[label] = contender.size
        return contender.start(threads)

    def _by_toolkit(self, label: str) -> Contender:
        if label not in self._quantized:
            try:
                self._quantized[label] = TOOLKITS[label](self._folded, self.images, self.folder)
            except Exception as error:  # the toolkits' exceptions have no common base
                self._quantized[label] = RuntimeError(_reason(error))
        found = self._quantized[label]
        if isinstance(found, RuntimeError):
            raise found
        return found

    @functools.cached_property
    def _folded(self) -> nn.Module:
        folded: nn.Module = backbones.fuse(copy.deepcopy(self.model), channels_last=False)
        return folded.requires_grad_(False)


class _Peer(nn.Module):
    """A contender of ``benchmark.py``, made at the first call; it keeps its own dtype.

    Raises:
        RuntimeError: it cannot be made or run, or a later call takes more than ``most_seconds``.
    """

    def __init__(self, contenders: Contenders, label: str, most_seconds: float) -> None:
        super().__init__()
        self._run: Run | None = None
        self._start = functools.partial(contenders.start, label)
        self._most_seconds = most_seconds

    def forward(self, images: Tensor) -> Tensor:
        try:
            if self._run is None:
                self._run = self._start(torch.get_num_threads())
                return self._run(images)
            start = time.perf_counter()
            output = self._run(images)
        except Exception as error:  # as above
            raise RuntimeError(_reason(error)) from error
        seconds = time.perf_counter() - start
        if seconds > self._most_seconds:
            raise RuntimeError(f"a call takes {seconds:.3g} s")
        return output


def _peer(contenders: Contenders, label: str, most_seconds: float, _: str) -> nn.Module:
    return _Peer(contenders, label, most_seconds)


def _reason(error: BaseException) -> str:
    if isinstance(error, RuntimeError) and error.args and "\n" not in str(error):
        return str(error)
    return f"{type(error).__name__}: {first_line(error)}"


def of_speed(
    name: str,
    batch: int,
    threads: Sequence[int],
    toolkits: Sequence[str],
    rounds: int,
    seconds: float,
    turn_seconds: float,
    most_seconds: float,
    size: int = SIZE,
) -> Iterator[dict[str, Any]]:
    """A row for each number of threads: what ``benchmark.py`` measures, and bytes on disk."""
    torch.manual_seed(0)
    model = backbones.create_model(name).eval()
    generator = torch.Generator().manual_seed(1)
    shape = (_CALIBRATION, batch, 3, size, size)
    images = list(torch.randn(shape, generator=generator))
    with tempfile.TemporaryDirectory() as folder:
        contenders = Contenders(model, images, toolkits, Path(folder))
        peers: dict[str, Callable[[str], nn.Module | None]] = {
            label: functools.partial(_peer, contenders, label, most_seconds)
            for label in contenders.labels
            if label not in MODES
        }
        for count in threads:
            torch._dynamo.reset()  # its code is for one number of threads
            row = Row(name, size, batch, count, "float32", "forward")
            found = measure_speed(row, MODES, peers, rounds, seconds, turn_seconds)
            for label in MODES:
                contenders.sizes[label] = OURS[label](model, images).size
            for label, bytes_on_disk in contenders.sizes.items():
                found["contenders"][label]["bytes"] = bytes_on_disk
            for figures in found["contenders"].values():
                if "skipped" in figures:  # as in the other part
                    figures["skipped"] = figures["skipped"].removeprefix("RuntimeError: ")
            yield {"part": "speed", **found, "versions": versions()}
    gc.collect()


def of_agreement(name: str, checkpoints: Path, toolkits: Sequence[str]) -> dict[str, Any]:
    """A row: predictions of the digits' validation images, one at a time on one thread."""
    torch._dynamo.reset()
    run = digits_run(checkpoints, name)
    exact = predict(run.model, run.images, 1)
    images = list(run.calibration.split(1))
    found: dict[str, Any] = {"float32": compare(exact, exact, run.labels)}
    with tempfile.TemporaryDirectory() as folder:
        contenders = Contenders(run.model, images, toolkits, Path(folder))
        for label in contenders.labels:
            try:
                outputs = predict(contenders.start(label, 1), run.images, 1)
            except Exception as error:  # as above
                found[label] = {"skipped": _reason(error)}
            else:
                figures = compare(outputs, exact, run.labels)
                found[label] = {**figures, "bytes": contenders.sizes[label]}
    counts = {"images": len(run.labels), "calibration_images": len(images)}
    key = {"part": "agreement", "model": name, "batch": 1, "threads": 1}
    return {**key, **counts, "contenders": found, "versions": versions()}


def versions() -> dict[str, str]:
    """The installed packages of the toolkits."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def describe_contender(figures: dict[str, Any]) -> str:
    """Its figures in one line."""
    if "skipped" in figures or "milliseconds" in figures:
        return describe(figures)
    return f"top-1 {figures['top1']:.2f} %  agreement {figures['agreement']:.2f} %"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from a command line."""
    parser = Parser(description=__doc__)
    parser.add_argument("part", choices=("agreement", "speed"))
    parser.add_argument("--models", nargs="+", metavar="NAME")
    parser.add_argument("--batches", nargs="+", type=whole(1), default=[1, 8], help="of speed")
    parser.add_argument("--threads", nargs="+", type=THREADS, default=[1, 2], help="of speed")
    parser.add_argument(
        "--toolkits", nargs="*", default=list(TOOLKITS), choices=list(TOOLKITS), metavar="LABEL"
    )
    parser.add_argument("--checkpoints", type=nonempty_path, metavar="FOLDER")
    parser.add_argument("--rounds", type=whole(1), default=5, help="turns per contender")
    parser.add_argument("--seconds", type=real(0), default=40, help="stop a row's turns after")
    parser.add_argument("--turn-ms", type=real(0), default=300.0, help="duration of a turn")
    parser.add_argument(
        "--most-seconds", type=real(0), default=5.0, help="skip toolkits with slower calls"
    )
    parser.add_argument("--resume", action="store_true", help="skip rows of the output")
    parser.add_argument("--output", type=nonempty_path, default=OUTPUT)
    args = parser.parse_args(arguments)
    names = args.models or list(CLASSIFIERS if args.part == "agreement" else MODELS)
    unknown = set(names) - set(backbones.list_models())
    if unknown:
        parser.error(f"unknown models {', '.join(sorted(unknown))}; see backbones.list_models()")
    if args.part == "agreement" and args.checkpoints is None:
        parser.error("agreement needs --checkpoints, the folder of int8_accuracy.py's runs")
    require_writable({"--output": (args.output, REPORT)}, makes_folders=True)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    try:
        report = load_report(args.output, _without_threads(here()))
    except ValueError as error:
        raise CommandError(str(error)) from error
    done = {tuple(row[key] for key in KEYS) for row in report["results"]} if args.resume else set()
    for row in _rows(args, names, done):
        replace_results(args.output, report, [row], KEYS)
        logger.info("%s", " ".join(f"{key} {row[key]}" for key in KEYS))
        for label, figures in row["contenders"].items():
            logger.info("    %-20s %s", label, describe_contender(figures))


def _rows(args: Any, names: Sequence[str], done: set[Any]) -> Iterator[dict[str, Any]]:
    if args.part == "agreement":
        for name in names:
            if ("agreement", name, 1, 1) in done:
                continue
            if not (args.checkpoints / name / "best.safetensors").is_file():
                logger.info("no run of %s in %s", name, args.checkpoints)
                continue
            yield of_agreement(name, args.checkpoints, args.toolkits)
        return
    for name, batch in itertools.product(names, args.batches):
        threads = [count for count in args.threads if ("speed", name, batch, count) not in done]
        if threads:
            turns = (args.rounds, args.seconds, args.turn_ms / 1e3, args.most_seconds)
            yield from of_speed(name, batch, threads, args.toolkits, *turns)


def _without_threads(machine: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in machine.items() if key != "threads"}


if __name__ == "__main__":
    sys.exit(guard(main))
