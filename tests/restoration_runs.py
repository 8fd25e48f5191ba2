"""Small trainings of restoration models for the tests: pictures, a tiny model, runs to kill."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import training_runs
from PIL import Image

from backbones.restoration import train as restoration

TINY = (
    "{dim: 8, depths: [1], num_heads: [2], window_size: 4, compress_ratio: 2, squeeze_factor: 4,"
    " head_width: 8}"
)
QUICK = [
    *("--model=hat_nano_x2", f"--model-args={TINY}", "--patch-size=8", "--batch-size=2"),
    *("--workers=0", "--threads=1", "--device=cpu", "--lr=1e-3", "--save-every-minutes=0"),
    *("--updates-per-epoch=4",),
]


def make_pictures(folder: Path, count: int, side: int = 40) -> Path:
    """Write ``folder/N.png``: smooth colours with some edges."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(count)
    for number in range(count):
        small = generator.integers(0, 256, (5, 6, 3), dtype=np.uint8)
        picture = Image.fromarray(small).resize((side + 4, side), Image.Resampling.BICUBIC)
        array = np.array(picture)
        array[side // 2 :, side // 3 : side // 2] = generator.integers(0, 256, 3)
        Image.fromarray(array).save(folder / f"{number}.png")
    return folder


def train(*arguments: str, pictures: bool = False) -> int:
    """Run ``tools/sr.py train`` in this process; draw the picture only if ``pictures`` is set."""
    with training_runs.unflushed():
        return restoration.main([*QUICK, *arguments]) if pictures else _train(*arguments)


def _train(*arguments: str) -> int:
    with patch.object(restoration.RestorationTrainer, "draw_comparison"):
        return restoration.main([*QUICK, *arguments])


# See training_runs.start.
start = partial(training_runs.start, train=_train)
