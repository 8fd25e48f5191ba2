"""Images, a small model for them and a table of its embeddings, for the tests."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import NamedTuple

import torch
import yaml
from training_runs import make_images

import backbones
from backbones.common.files import save_weights
from backbones.embedding import embed

_ARGUMENTS = {"dims": [16, 24, 32], "depths": [1, 1, 1], "attn_dims": [0, 8, 8]}


class Embedded(NamedTuple):
    """Paths of the images, the checkpoint and the table.

    Attributes:
        images: folder with ``train`` and ``val`` of three classes, and a copy of one image.
        checkpoint: with its recipe next to it.
        table: of the images.
    """

    images: Path
    checkpoint: Path
    table: Path


def embed_images(folder: Path) -> Embedded:
    """Embed 12 images for training, 6 for validation and ``train/class1/copy.png``."""
    images = make_images(folder / "images", {"train": 12, "val": 6})
    shutil.copy(images / "train/class1/004.png", images / "train/class1/copy.png")
    torch.manual_seed(0)
    model = backbones.create_model("shvit_s1", num_classes=3, **_ARGUMENTS)
    checkpoint = folder / "run" / "best.safetensors"
    checkpoint.parent.mkdir()
    save_weights(checkpoint, model.state_dict(), {"model": "shvit_s1"})
    recipe = {"model": "shvit_s1", "model_args": _ARGUMENTS, "num_classes": 3, "img_size": 32}
    (checkpoint.parent / "config.yaml").write_text(yaml.safe_dump({**recipe, "data": "x"}))
    table = folder / "table"
    embed(images, table, checkpoint=checkpoint, workers=1, rows=8)
    return Embedded(images, checkpoint, table)
