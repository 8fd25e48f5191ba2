"""Small runs of ``vision-backbones embed`` for the tests: a tiny model, small images, processes."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from PIL import Image
from training_runs import Run, make_images, unflushed

import backbones
from backbones.cli.main import main
from backbones.common.files import save_weights
from backbones.embedding import embed, worker
from backbones.embedding.table import load

_SHALLOW = {"dims": [16, 24, 32], "depths": [1, 1, 1], "attn_dims": [0, 8, 8]}


def tiny_checkpoint(
    folder: Path, seed: int = 0, classes: int = 5, std: float | None = 0.3, **changes: Any
) -> Path:
    """Write weights of a shallow SHViT for 32×32 pixels, and their recipe.

    Default initialisation (``std`` of None) nearly erases noise.
    """
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    chans = {"in_chans": changes["in_chans"]} if "in_chans" in changes else {}
    model = backbones.create_model("shvit_s1", num_classes=classes, **_SHALLOW, **chans)
    for parameter in model.parameters() if std is not None else ():
        torch.nn.init.normal_(parameter, std=std)
    path = folder / "best.safetensors"
    names = json.dumps([f"class{number}" for number in range(classes)])
    save_weights(path, model.state_dict(), {"model": "shvit_s1", "classes": names})
    recipe = {"model": "shvit_s1", "model_args": _SHALLOW, "num_classes": classes, "img_size": 32}
    (folder / "config.yaml").write_text(yaml.safe_dump({**recipe, "data": "x", **changes}))
    return path


def make_photos(folder: Path, count: int) -> Path:
    """Write noise of different sizes to ``folder/N.png`` and ``folder/sub/N.jpg``."""
    (folder / "sub").mkdir(parents=True)
    generator = np.random.default_rng(0)
    for number in range(count):
        pixels = generator.integers(0, 255, (36 + number % 7, 40 + number % 5, 3), dtype=np.uint8)
        name = f"sub/{number:03}.jpg" if number % 3 else f"{number:03}.png"
        Image.fromarray(pixels).save(folder / name)
    return folder


def words(source: Path | str, out: Path, checkpoint: Path, *more: str) -> list[str]:
    """A ``vision-backbones`` command line, with one process unless ``more`` says otherwise."""
    start = ["embed", str(source), "--out", str(out), "--checkpoint", str(checkpoint)]
    return [*start, "--rows=4", "--batch-size=3", "--workers=1", *more]


class Embedded(NamedTuple):
    """Paths of images, a checkpoint with its recipe, and a table.

    Attributes:
        images: folder with ``train`` and ``val`` of three classes, and a copy of one image.
    """

    images: Path
    checkpoint: Path
    table: Path


def embed_images(folder: Path) -> Embedded:
    """Embed 12 images for training, 6 for validation and ``train/class1/copy.png``."""
    images = make_images(folder / "images", {"train": 12, "val": 6})
    shutil.copy(images / "train/class1/004.png", images / "train/class1/copy.png")
    checkpoint = tiny_checkpoint(folder / "run", classes=3, std=None)
    embed(images, folder / "table", checkpoint=checkpoint, workers=1, rows=8)
    return Embedded(images, checkpoint, folder / "table")


def start(argv: list[str], before: Callable[[], None] | None = None) -> Run:
    """Start the command in a process of its own, which runs ``before`` first."""
    process = Run(target=_run, args=(argv, before))
    process.start()
    return process


def _run(argv: list[str], before: Callable[[], None] | None) -> None:
    os.setpgid(0, 0)  # so that its child processes can be found
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - open until the process ends
    with unflushed():
        if before is not None:
            before()
        os._exit(main(argv))


def decode_slowly() -> None:
    """Slow down decoding, so that there is time to kill this process."""
    decode = worker.Worker.decode

    def slowly(*args: Any) -> Any:
        time.sleep(0.01)
        return decode(*args)

    worker.Worker.decode = slowly


def same(one: Path, other: Path) -> bool:
    """Whether two tables have the same keys and bit-identical embeddings."""
    (keys, vectors), (other_keys, other_vectors) = load(one), load(other)
    return keys == other_keys and np.array_equal(vectors, other_vectors)
