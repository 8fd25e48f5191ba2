"""Images, a small model for them and a table of its embeddings, for the tests."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import NamedTuple

from embedding_runs import tiny_checkpoint
from training_runs import make_images

from backbones.embedding import embed


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
    checkpoint = tiny_checkpoint(folder / "run", classes=3)
    table = folder / "table"
    embed(images, table, checkpoint=checkpoint, workers=1, rows=8)
    return Embedded(images, checkpoint, table)
