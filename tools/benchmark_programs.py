"""Training, a process's first image, guards, for ``benchmark.py --op``; what programs share."""

from __future__ import annotations

import io
import itertools
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_dataset, create_loader
from torch import Tensor, nn

from backbones.cli.reports import load_report, parsed, put_rows, write_report
from backbones.cli.timing import machine, ratio
from backbones.common.arguments import whole
from backbones.common.console import Parser
from backbones.common.images import open_image
from backbones.common.processes import World
from backbones.common.progress import Progress
from backbones.common.signals import StopRequest
from backbones.data.corrupt import CorruptImages
from backbones.data.splits import open_splits
from backbones.restoration.data import TRAINING, VALIDATION, find_photographs
from backbones.training import build, optimization
from backbones.training.loader import TrainLoader
from backbones.training.recipe import Recipe

logger = logging.getLogger(__name__)
ROOT = Path(__file__).resolve().parent.parent
REPORTS = ROOT / "docs" / "performance"

IMAGES, SIZE = 512, (500, 375)


def make_photos(
    folder: Path, copies: int, size: tuple[int, int] = SIZE, count: int = IMAGES
) -> Path:
    """Write ``count`` random crops of photographs as JPEGs, each under ``copies`` names."""
    rng = np.random.default_rng(0)
    scenes = [open_image(path) for path in find_photographs(TRAINING + VALIDATION)]
    for number in range(count):
        scene = scenes[number % len(scenes)]
        share = rng.uniform(0.5, 1)
        width, height = (round(share * side) for side in scene.size)
        corners = zip(scene.size, (width, height), strict=True)
        left, top = (rng.integers(0, whole - part + 1) for whole, part in corners)
        cut = scene.crop((left, top, left + width, top + height))
        cut = cut.resize(size, Image.Resampling.BICUBIC)
        for copy in range(copies):
            path = folder / f"{copy:04}" / f"{number:03}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            if copy:
                os.link(folder / "0000" / path.name, path)
            else:
                cut.save(path, quality=90)
    return folder


def in_turns(rounds: int, *ways: Callable[[], float]) -> list[list[float]]:
    """Run the functions alternately, in both orders; return the figures of each, by round."""
    figures = []
    for number in range(rounds):
        order = range(len(ways))[:: 1 if number % 2 else -1]
        found = {place: ways[place]() for place in order}
        figures.append([found[place] for place in range(len(ways))])
    return [list(column) for column in zip(*figures, strict=True)]


# -- training --------------------------------------------------------------------------------------

LOADER_AIM, STEP_AIM = 0.90, 1.05
CONFIG = {
    "input_size": (3, 224, 224),
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
    "interpolation": "bicubic",
}


def our_loader(recipe: Recipe, folder: Path, world: World) -> TrainLoader:
    """train_cls.py's."""
    splits = open_splits(recipe)
    corrupt = CorruptImages(folder / "corrupt.txt", 0.0)
    return TrainLoader(splits.train, CONFIG, recipe, world, corrupt)


def timms_loader(recipe: Recipe, folder: Path, world: World) -> Any:
    """timm's, for the same recipe."""
    dataset = create_dataset("", root=str(folder), split="train", is_training=True)
    return create_loader(
        dataset,
        input_size=CONFIG["input_size"],
        batch_size=recipe.batch_size,
        is_training=True,
        scale=recipe.scale,
        ratio=recipe.ratio,
        hflip=recipe.hflip,
        color_jitter=recipe.color_jitter,
        auto_augment=recipe.aa,
        interpolation=recipe.train_interpolation,
        mean=CONFIG["mean"],
        std=CONFIG["std"],
        num_workers=recipe.workers,
        pin_memory=recipe.pin_memory and world.device.type == "cuda",
        device=world.device,
        persistent_workers=recipe.workers > 0,
    )


def read_all(batches: Iterator[Any]) -> float:
    """Seconds to read an epoch; the synthetic model computes the mean."""
    begun = time.perf_counter()
    for images, _ in batches:
        images.mean().item()
    return time.perf_counter() - begun


def compare_loaders(options: Namespace, world: World, folder: Path) -> dict[str, Any]:
    """Measure both loaders alternately."""
    for split, count in (("train", options.images // 2), ("validation", 1)):
        make_photos(folder / split, copies=2, count=count)  # a class each
    given = {key: getattr(options, key) for key in ("batch_size", "workers", "aa")}
    recipe = Recipe(data=str(folder), train_interpolation="bicubic", **given)
    ours, timms = our_loader(recipe, folder, world), timms_loader(recipe, folder, world)
    read_all(ours.epoch(0))  # start processes, fill the file cache
    read_all(iter(timms))
    epochs = itertools.count(1)
    of_ours, of_timms = in_turns(
        options.turns,
        lambda: read_all(ours.epoch(next(epochs))),
        lambda: read_all(iter(timms)),
    )
    ours.close()
    images, found = ours.batches * options.batch_size, ratio(of_timms, of_ours)
    return {
        **given,
        "images": images,
        "ours_images_per_second": images / statistics.median(of_ours),
        "timm_images_per_second": images / statistics.median(of_timms),
        "ratio": found,
        "aim": f"ratio >= {LOADER_AIM}",
        "met": found >= LOADER_AIM,
    }


def compare_steps(options: Namespace, world: World, folder: Path) -> dict[str, Any]:
    """Measure both steps alternately, each with its own copy of the network."""
    recipe = Recipe(
        model=options.model,
        data="digits",
        img_size=options.step_size,
        batch_size=options.step_batch_size,
        workers=0,
        drop_path=0.0,
        smoothing=0.0,
        sched="constant",
        warmup_epochs=0.0,
        lr=1e-3,
    )
    progress = Progress(world, io.StringIO())
    sys.path.insert(0, str(ROOT))
    import train_cls  # a script beside the packages, which no installation has

    trainer = train_cls.Trainer(recipe, folder, world, StopRequest(), progress)
    images = torch.randn(options.step_batch_size, 3, options.step_size, options.step_size)
    images, labels = images.to(world.device), torch.arange(len(images)) % 10
    labels = labels.to(world.device)
    # An epoch of the real loop, with precomputed batches.
    trainer.batches = lambda: itertools.repeat((images, labels))  # type: ignore[method-assign]
    trainer.updates_per_epoch = options.steps

    network = build.build_model(recipe, 10).to(world.device).train()
    optimizer = optimization.build_optimizer(recipe, network, 1e-3)
    criterion = nn.CrossEntropyLoss()

    def ours() -> None:
        trainer.step = 0
        trainer.train_epoch()

    def bare() -> None:
        network.train()
        for _ in range(options.steps):
            loss: Tensor = criterion(network(images), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def seconds(loop: Callable[[], None]) -> float:
        begun = time.perf_counter()
        loop()
        if world.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begun

    for loop in (ours, bare):
        seconds(loop)
    spent = in_turns(options.turns * 4, partial(seconds, ours), partial(seconds, bare))
    trainer.close()
    found = ratio(*spent)
    ours_ms, bare_ms = (1e3 * statistics.median(times) / options.steps for times in spent)
    return {
        "model": options.model,
        "img_size": options.step_size,
        "batch_size": options.step_batch_size,
        **{"ours_ms": ours_ms, "bare_ms": bare_ms, "ratio": found},
        "aim": f"ratio <= {STEP_AIM}",
        "met": found <= STEP_AIM,
    }


def training(arguments: Sequence[str]) -> int:
    """The overhead of the training code: data loader and training step; 1 if an aim is missed.

    Loader: images per second of train_cls.py's loader and of timm's create_loader, same JPEG files,
    same transforms, same number of processes, with a synthetic model that only reads its input.
    Step: a step of train_cls.py (including checks for signals, non-finite losses and time to save,
    metrics and schedule) and a minimal loop in PyTorch, with the same network, batch and optimizer.
    The aims are 90 % of timm's rate and at most 5 % more time than the minimal loop, as medians of
    the ratios of adjacent turns.
    """
    parser = Parser(prog="benchmark.py --op training", description=training.__doc__)
    add = parser.add_argument
    add("--images", type=whole(1), default=512, help="JPEG files of 500×375")
    add("--batch-size", type=whole(1), default=32, help="loaders' batch size")
    add("--workers", type=whole(0), default=1, help="loader processes")
    add("--aa", help="such as rand-m9-mstd0.5-inc1")
    add("--model", default="shvit_s1", help="batch size of the step")
    add("--step-size", type=whole(1), default=64, help="image size of the step")
    add("--step-batch-size", type=whole(1), default=32)
    add("--steps", type=whole(1), default=4, help="steps per turn")
    add("--turns", type=whole(1), default=7)
    add("--threads", type=whole(1), default=1)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parsed(parser, arguments, Path("runs/training.json"))
    torch.set_num_threads(options.threads)
    world = World(0, 1, torch.device(options.device))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "run").mkdir()
        report: dict[str, Any] = {
            "machine": machine(world.device),
            "loader": compare_loaders(options, world, folder / "images"),
            "step": compare_steps(options, world, folder / "run"),
        }
    for part in ("loader", "step"):
        figures = {k: round(v, 3) if isinstance(v, float) else v for k, v in report[part].items()}
        logger.info("%s: %s", part, figures)
    write_report(options.output, report)
    return 0 if report["loader"]["met"] and report["step"]["met"] else 1


# -- the first image -------------------------------------------------------------------------------

# Whether the process has a compiler.
WAYS = {"wheel": False, "source": True, "no-compiler": False}
_FIRST_IMAGE = """
import json, os, sys, time
import torch
import backbones
torch.set_num_threads(1)
name, form = sys.argv[1:]
model = backbones.create_model(name).eval().to(memory_format=torch.channels_last)
side = model.pretrained_cfg["input_size"][1:]
image = torch.randn(1, 3, *side).to(memory_format=torch.channels_last)
def cpu(): return sum(os.times()[:4])  # of this process and its finished children (compilers)
start = time.perf_counter(), cpu()
with torch.inference_mode():
    (backbones.fuse(model) if form == "fused" else model)(image)
print(json.dumps([time.perf_counter() - start[0], cpu() - start[1]]))
"""


def first_image(
    model: str, form: str, python: str, tree: Path | None, compiler: bool
) -> tuple[float, float]:
    """Wall-clock seconds and CPU seconds."""
    with tempfile.TemporaryDirectory() as empty:
        environment = {**os.environ, "VISION_BACKBONES_CACHE_DIR": empty, "OMP_NUM_THREADS": "1"}
        environment.pop("PYTHONPATH", None)
        environment.pop("CXX", None)
        if tree is not None:
            environment["PYTHONPATH"] = str(tree)
        if not compiler:
            environment["PATH"] = empty
        hidden = "" if compiler else "import sys; sys.modules['ziglang'] = None\n"
        words = [python, "-c", hidden + _FIRST_IMAGE, model, form]
        done = subprocess.run(
            words, cwd=empty, env=environment, stdout=subprocess.PIPE, text=True, check=True
        )
    passed, cpu = json.loads(done.stdout.splitlines()[-1])
    return passed, cpu


def measure_start(
    way: str, models: Sequence[str], python: str, tree: Path | None, rounds: int
) -> list[dict[str, Any]]:
    """A result for each model."""
    results = []
    for model in models:
        result: dict[str, Any] = {"way": way, "model": model, "rounds": rounds}
        for form in ("plain", "fused"):
            runs = [first_image(model, form, python, tree, WAYS[way]) for _ in range(rounds)]
            passed, cpu = (statistics.median(times) for times in zip(*runs, strict=True))
            result[form] = {"seconds": round(passed, 3), "cpu_seconds": round(cpu, 3)}
        results.append(result)
    return results


def cold_start(arguments: Sequence[str]) -> None:
    """How long the first image takes in a new process with one thread and an empty kernel cache.

    Imports and the creation of the model are excluded; folding is included. `wheel` takes --python
    of an environment that has only the wheel; the others import this checkout.
    """
    parser = Parser(prog="benchmark.py --op cold_start", description=cold_start.__doc__)
    add = parser.add_argument
    add("way", choices=list(WAYS), help="what to measure again")
    add("--models", nargs="+", default=("shvit_s4", "van_b0", "medvitv2_tiny"), metavar="NAME")
    add("--python", default=sys.executable, help="the interpreter to run")
    add("--rounds", type=whole(1), default=1, help="processes to take the median over")
    args = parsed(parser, arguments, REPORTS / "cold_start.json")
    report = load_report(args.output, {**machine(torch.device("cpu")), "threads": 1})
    tree = None if args.way == "wheel" else ROOT
    rows = measure_start(args.way, args.models, args.python, tree, args.rounds)
    put_rows(report, rows, ("way", "model"))
    write_report(args.output, report)


_GUARDS = """
import json, platform, statistics, sys, time
import timm, torch
import backbones
from ops.fuse.guards import Guards
torch.set_num_threads(1)
model = backbones.fuse(timm.create_model(sys.argv[1]).eval())
image, hold, calls = torch.rand(1, 3, 224, 224), Guards.hold, {"with": [], "without": []}
with torch.inference_mode():
    for _ in range(20): model(image)
    assert model.is_replayed
    for number in range(int(sys.argv[2])):
        for form in sorted(calls, reverse=number % 2):
            Guards.hold = hold if form == "with" else lambda self: True
            begin = time.perf_counter()
            model(image)
            calls[form].append(time.perf_counter() - begin)
taken = statistics.median(a - b for a, b in zip(calls["with"], calls["without"]))
print(json.dumps([platform.python_version(), statistics.median(calls["with"]), taken]))
"""


def guards(arguments: Sequence[str]) -> None:
    """How much of a fused model's call the check takes that nothing it watches has changed.

    Calls with and without the check alternate in one process, so that caches are as after a call;
    the cost is the median of the differences. In turns with each interpreter, given its torch.
    """
    parser = Parser(prog="benchmark.py --op guards", description=guards.__doc__)
    add = parser.add_argument
    add("--model", default="mobilenetv3_small_100", metavar="NAME", help="of timm")
    add("--pythons", nargs="+", default=[sys.executable], help="the interpreters to run")
    add("--calls", type=whole(1), default=2000, help="of each form in a process")
    add("--rounds", type=whole(1), default=5, help="processes to take the median over")
    args = parsed(parser, arguments, REPORTS / "guards.json")
    report = load_report(args.output, {**machine(torch.device("cpu")), "threads": 1})
    found: dict[str, list[tuple[float, float]]] = {}
    for python in args.pythons * args.rounds:
        words = [python, "-W", "ignore", "-c", _GUARDS, args.model, str(args.calls)]
        run = subprocess.run(words, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
        version, call, taken = json.loads(run.stdout.splitlines()[-1])
        found.setdefault(version, []).append((call, taken))
    for version, runs in found.items():
        call, taken = (statistics.median(times) for times in zip(*runs, strict=True))
        row = {"python": version, "model": f"timm/{args.model}", "calls": args.calls}
        row |= {"call_ms": round(1e3 * call, 3), "guards_us": round(1e6 * taken, 1)}
        put_rows(report, [row], ("python", "model"))
    write_report(args.output, report)
