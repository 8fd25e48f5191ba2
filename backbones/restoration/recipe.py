"""The recipe of a restoration training: the keys of any training, and the restoration task."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from backbones.common.keys import Range, again, key
from backbones.training.recipe import Recipe

_GROUPS = ("optimizer", "schedule", "ema", "run")
_KEYS = (
    *("model", "pretrained", "checkpoint", "in_chans", "drop_path", "model_args"),
    *("batch_size", "workers", "pin_memory", "max_corrupt"),
    *("device", "threads", "amp", "compile", "grad_checkpointing"),
)


@dataclass
class RestorationRecipe(Recipe):
    """Every key of a restoration recipe, with its default: L1, Adam, as HAT was trained.

    ``python tools/sr.py train --help`` prints this list.
    """

    refused: ClassVar[frozenset[str]] = frozenset(
        f.name for f in dataclasses.fields(Recipe) if f.metadata["group"] not in _GROUPS
    ) - {*_KEYS}
    groups: ClassVar[tuple[str, ...]] = (*Recipe.groups, "task", "pictures")

    # --- other defaults than a classifier's
    batch_size: int = again(Recipe, "batch_size", 4, "patches per step and process")
    opt: str = again(Recipe, "opt", "adam")
    opt_betas: tuple[float, ...] | None = again(Recipe, "opt_betas", (0.9, 0.99), "as HAT")
    lr: float | None = again(Recipe, "lr", 2e-4)
    weight_decay: float = again(Recipe, "weight_decay", 0.0)
    epochs: int = again(
        Recipe, "epochs", 100, "number of epochs, each of updates_per_epoch updates"
    )
    sched: str = again(
        *(Recipe, "sched", "multistep"),
        allowed=("cosine", "multistep", "step", "poly", "constant", "plateau", "none"),
    )
    warmup_epochs: float = again(Recipe, "warmup_epochs", 0.0)
    min_lr: float = again(Recipe, "min_lr", 1e-7)
    decay_milestones: tuple[int, ...] = again(
        Recipe, "decay_milestones", (50, 80, 90, 95), "multistep, in epochs"
    )
    decay_rate: float = again(Recipe, "decay_rate", 0.5)
    ema: bool = again(Recipe, "ema", True)
    ema_decay: float = again(Recipe, "ema_decay", 0.999)

    # --- what is restored
    task: str = key(
        "task",
        "sr",
        "sr: downscaled by the model's upscale (bicubic, as in MATLAB); denoise: Gaussian noise; "
        "jpeg: JPEG artifacts; real: the chain of Real-ESRGAN",
        ("sr", "denoise", "jpeg", "real"),
    )
    sigma: tuple[float, ...] = key(
        *("task", (25.0,), "denoise: σ in 0 … 255; several: one at random"),
        Range(low=0, high=255),
    )
    quality: tuple[int, ...] = key(
        *("task", (10, 40), "jpeg: lowest and highest quality"),
        Range(low=1, high=100, counts=(2,)),
    )
    usm: bool = key("task", True, "real: sharpen the ground truth, as published")

    # --- the pictures
    train_pictures: str = key(
        "pictures", "", "folder of images, a glob, or photographs (bundled with scikit-image)"
    )
    val_pictures: str = key("pictures", "", "the same for validation")
    patch_size: int = key(
        "pictures", 64, "side of the model's input patches, in pixels", Range(low=1, high=4096)
    )
    updates_per_epoch: int = key("pictures", 5000, "length of an epoch", Range(low=1, high=10**6))
    symmetries: bool = key("pictures", True, "random flips and rotations of patches")
    cache: bool = key("pictures", False, "keep decoded images in memory")
    val_tile: int = key(
        *("pictures", 0, "validate in tiles of this side, to save memory; 0: whole"),
        Range(low=0, high=2**16),
    )

    def rules(self) -> Iterator[tuple[str, bool, str]]:
        yield from super().rules()
        yield "sigma", bool(self.sigma), "one or more numbers"
        yield "quality", self.quality[0] <= self.quality[1], "the lowest and the highest"
        yield "in_chans", self.task != "real" or self.in_chans == 3, "3 with task: real"
