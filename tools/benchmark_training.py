"""Measure the overhead of the training code: data loader and training step.

    python tools/benchmark_training.py --output docs/performance/training.json
    python tools/learning_page.py                       adds it to docs/learning.md

**Loader**: images per second of train_cls.py's loader and of timm's ``create_loader``, same JPEG
files, same transforms, same number of processes, with a synthetic model that only reads its input.
**Step**: a step of train_cls.py (including checks for signals, non-finite losses and time to save,
metrics and schedule) and a minimal loop in PyTorch, with the same network, batch and optimizer.

Contenders are measured alternately, and the result is the median of the ratios of adjacent turns,
since a busy machine slows both down. The exit status is 1 if the loader is below 90 % of timm's or
the step is more than 5 % slower than the minimal one.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import machine
from PIL import Image
from timm.data import create_dataset, create_loader
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train_cls  # noqa: E402
from backbones.common.arguments import nonempty_path  # noqa: E402
from backbones.common.files import write_text_atomically  # noqa: E402
from backbones.common.outputs import REPORT, add_overwrite, require_writable  # noqa: E402
from backbones.common.processes import World  # noqa: E402
from backbones.common.progress import Progress  # noqa: E402
from backbones.common.signals import StopRequest  # noqa: E402
from backbones.data.corrupt import CorruptImages  # noqa: E402
from backbones.training import build, optimization  # noqa: E402
from backbones.training.data import open_splits  # noqa: E402
from backbones.training.loader import TrainLoader  # noqa: E402
from backbones.training.recipe import Recipe  # noqa: E402

LOADER_AIM, STEP_AIM = 0.90, 1.05
CONFIG = {
    "input_size": (3, 224, 224),
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
    "interpolation": "bicubic",
}


def write_images(folder: Path, count: int) -> None:
    """``folder/train/CLASS/N.jpg`` and a validation image of each of two classes: soft noise."""
    generator = np.random.default_rng(0)
    for number in range(count + 2):
        split = "train" if number < count else "validation"
        place = folder / split / f"class{number % 2}"
        place.mkdir(parents=True, exist_ok=True)
        coarse = generator.integers(0, 256, (24, 32, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((500, 375), Image.Resampling.BICUBIC)
        image.save(place / f"{number:05}.jpg", quality=90)


def our_loader(recipe: Recipe, folder: Path, world: World) -> TrainLoader:
    """train_cls.py's."""
    splits = open_splits(recipe)
    corrupt = CorruptImages(folder / "corrupt.txt", 0.0)
    return TrainLoader(splits.train, splits.train_size, CONFIG, recipe, world, corrupt)


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


def compare_loaders(options: argparse.Namespace, world: World, folder: Path) -> dict[str, Any]:
    """Measure both loaders alternately."""
    write_images(folder, options.images)
    recipe = Recipe(
        data=str(folder), batch_size=options.batch_size, workers=options.workers, aa=options.aa
    )
    recipe.train_interpolation = "bicubic"
    ours, timms = our_loader(recipe, folder, world), timms_loader(recipe, folder, world)
    read_all(ours.epoch(0))  # start processes, fill the file cache
    read_all(iter(timms))
    turns = []
    for turn in range(options.turns):
        contenders: list[tuple[str, Callable[[], float]]] = [
            ("ours", lambda turn=turn: read_all(ours.epoch(turn + 1))),  # type: ignore[misc]
            ("timm", lambda: read_all(iter(timms))),
        ]
        seconds = {n: measure() for n, measure in (contenders if turn % 2 else contenders[::-1])}
        turns.append(seconds)
    ours.close()
    images = ours.batches * options.batch_size
    return {
        "workers": options.workers,
        "aa": options.aa,
        "batch_size": options.batch_size,
        "images": images,
        "ours_images_per_second": images / statistics.median(t["ours"] for t in turns),
        "timm_images_per_second": images / statistics.median(t["timm"] for t in turns),
        "ratio": statistics.median(t["timm"] / t["ours"] for t in turns),
        "aim": f"ratio >= {LOADER_AIM}",
        "met": statistics.median(t["timm"] / t["ours"] for t in turns) >= LOADER_AIM,
    }


def compare_steps(options: argparse.Namespace, world: World, folder: Path) -> dict[str, Any]:
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
    progress = Progress(stream=io.StringIO())
    trainer = train_cls.Trainer(recipe, folder, world, StopRequest(), progress)
    images = torch.randn(options.step_batch_size, 3, options.step_size, options.step_size)
    images, labels = images.to(world.device), torch.arange(len(images)) % 10
    labels = labels.to(world.device)
    # An epoch of the real loop, with precomputed batches.
    trainer.batches = lambda: repeat((images, labels))  # type: ignore[method-assign]
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
    turns = []
    for turn in range(options.turns * 4):
        first, second = (ours, bare) if turn % 2 else (bare, ours)
        spent = {first.__name__: seconds(first)}
        spent[second.__name__] = seconds(second)
        turns.append(spent)
    trainer.close()
    ratio = statistics.median(t["ours"] / t["bare"] for t in turns)
    return {
        "model": options.model,
        "img_size": options.step_size,
        "batch_size": options.step_batch_size,
        "ours_ms": 1e3 * statistics.median(t["ours"] for t in turns) / options.steps,
        "bare_ms": 1e3 * statistics.median(t["bare"] for t in turns) / options.steps,
        "ratio": ratio,
        "aim": f"ratio <= {STEP_AIM}",
        "met": ratio <= STEP_AIM,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run from a command line and return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--output", type=nonempty_path, help="a JSON file")
    add("--images", type=int, default=512, help="JPEG files of 500×375")
    add("--batch-size", type=int, default=32, help="of the loaders")
    add("--workers", type=int, default=1, help="loader processes")
    add("--aa", help="such as rand-m9-mstd0.5-inc1")
    add("--model", default="shvit_s1", help="of the step")
    add("--step-size", type=int, default=64, help="side of its images")
    add("--step-batch-size", type=int, default=32)
    add("--steps", type=int, default=4, help="in a turn")
    add("--turns", type=int, default=7)
    add("--threads", type=int, default=1)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add_overwrite(parser)
    options = parser.parse_args(argv)
    require_writable({"--output": (options.output, REPORT)}, overwrite=options.overwrite)
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
        row = report[part].items()
        figures = {k: round(v, 3) if isinstance(v, float) else v for k, v in row}
        sys.stdout.write(f"{part}: {figures}\n")
    if options.output is not None:
        write_text_atomically(options.output, json.dumps(report, indent=1) + "\n")
    return 0 if report["loader"]["met"] and report["step"]["met"] else 1


if __name__ == "__main__":
    sys.exit(main())
