"""Networks trained by two quickstart recipes, and their images, for tools that measure them.

Classifiers on scikit-learn's digits (``configs/cls/bench_digits.yaml``) and a small HAT on
photographs (``configs/sr/quickstart.yaml``). A folder has one run a model, ``FOLDER/MODEL``.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from torch import Tensor, nn

from backbones.common.processes import World
from backbones.data.corrupt import CorruptImages
from backbones.data.sources import ImageSource
from backbones.restoration.data import degrade_picture, find_pictures, load_truth
from backbones.restoration.recipe import RestorationRecipe
from backbones.restoration.restorer import load_restorer
from backbones.training import build
from backbones.training.command_line import load_recipe
from backbones.training.data import open_splits
from backbones.training.loader import ValidationLoader
from backbones.training.recipe import Recipe
from backbones.training.trained import load_trained

__all__ = [
    "CLASSIFIERS",
    "DIGITS",
    "RESTORER",
    "ROOT",
    "Digits",
    "Pictures",
    "digits_run",
    "pictures_run",
    "train",
]

ROOT = Path(__file__).resolve().parent.parent
DIGITS = ROOT / "configs" / "cls" / "bench_digits.yaml"
PICTURES = ROOT / "configs" / "sr" / "quickstart.yaml"
CLASSIFIERS: tuple[str, ...] = tuple(yaml.safe_load(DIGITS.read_text(encoding="utf-8"))["variants"])
RESTORER = "hat_nano_x2"
CALIBRATION = 64  # digits
_BATCH = 32
_CPU = torch.device("cpu")
_PATCH = 64  # side of the input in a picture's middle that HAT is calibrated with


class Digits(NamedTuple):
    """A trained classifier, preprocessed training images, and all validation images."""

    model: nn.Module
    calibration: Tensor
    images: Tensor
    labels: Tensor


class Pictures(NamedTuple):
    """A trained restorer with batches to calibrate it and pairs of input and truth, (C, H, W)."""

    model: nn.Module
    calibration: list[Tensor]
    pairs: list[tuple[Tensor, Tensor]]


def train(model: str, folder: Path) -> Path:
    """Train a model in a process of its own, on one thread; returns the run's folder.

    Raises:
        SystemExit: the training failed.
    """
    restores = model == RESTORER
    script = ROOT / "tools" / "train_sr.py" if restores else ROOT / "train_cls.py"
    command = [sys.executable, str(script), "--config", str(PICTURES if restores else DIGITS)]
    command += ["--model", model, "--output", str(folder), "--name", model]
    status = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode
    if status:
        raise SystemExit(f"{model}: the training ended with status {status}")
    return folder / model


def digits_run(folder: Path, model: str) -> Digits:
    """A classifier's run in ``folder``, and the first training and all validation images.

    Raises:
        TrainingError: there is no such run, or it is of another kind.
    """
    recipe = load_recipe(folder / model / "config.yaml", {"workers": 0, "batch_size": _BATCH})
    splits = open_splits(recipe)
    weights = str(folder / model / "best.safetensors")
    network = load_trained(model, weights, len(splits.classes), recipe.in_chans, recipe.model_args)
    config = build.preprocessing(recipe, network)
    assert isinstance(splits.train, ImageSource) and isinstance(splits.validation, ImageSource)
    calibration, _ = _preprocessed(splits.train, CALIBRATION, config, recipe)
    images, labels = _preprocessed(splits.validation, splits.validation_size, config, recipe)
    return Digits(network.eval(), calibration, images, labels)


def _preprocessed(
    source: ImageSource, count: int, config: dict[str, Any], recipe: Recipe
) -> tuple[Tensor, Tensor]:
    """The first ``count`` images, without augmentation, and their labels."""
    images: list[Tensor] = []
    labels: list[Tensor] = []
    with tempfile.TemporaryDirectory() as folder:
        corrupt, world = CorruptImages(Path(folder) / "corrupt.txt", 0), World(0, 1, _CPU)
        loader = ValidationLoader(source, count, config, recipe, world, corrupt)
        try:
            for batch, truth in loader:
                images.append(batch)
                labels.append(truth)
                if sum(map(len, labels)) >= count:
                    break
        finally:
            loader.close()
    return torch.cat(images)[:count], torch.cat(labels)[:count]


def pictures_run(folder: Path, model: str = RESTORER) -> Pictures:
    """A restorer's run in ``folder``, middles of its training pictures and all validation pictures.

    Raises:
        TrainingError: there is no such run, or it is of another kind.
    """
    recipe = load_recipe(folder / model / "config.yaml", {}, RestorationRecipe)
    network: Any = load_restorer(model, folder / model / "best.safetensors").eval()

    def pairs(paths: Sequence[Path]) -> list[tuple[Tensor, Tensor]]:
        truths = [load_truth(path, recipe.in_chans, network.upscale) for path in paths]
        return [
            degrade_picture(recipe, t, network.upscale, number) for number, t in enumerate(truths)
        ]

    training = find_pictures(recipe.train_pictures, training=True)
    calibration = [_middle(degraded).unsqueeze(0) for degraded, _ in pairs(training)]
    validation = find_pictures(recipe.val_pictures, training=False)
    return Pictures(network, calibration, pairs(validation))


def _middle(image: Tensor) -> Tensor:
    top, left = (max(0, (side - _PATCH) // 2) for side in image.shape[1:])
    return image[:, top : top + _PATCH, left : left + _PATCH]
