"""Reproducible pairs of degraded and ground-truth patches, cropped during training."""

from __future__ import annotations

import glob
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from backbones.common.errors import DataError
from backbones.common.generators import mix_seed
from backbones.common.images import has_image_ending
from backbones.common.processes import World
from backbones.data.batches import LoaderOwner, first_batches
from backbones.data.corrupt import CorruptImages
from backbones.data.sampler import Key, TrainSampler
from backbones.restoration.degrade import add_noise, compress, real_world, sharpen
from backbones.restoration.metrics import quantize
from backbones.restoration.pictures import PictureError, read_picture, to_tensor
from backbones.restoration.recipe import RestorationRecipe
from backbones.restoration.resize import resize_bicubic

Pair = tuple[Tensor, Tensor]

# Photographs bundled with scikit-image and scikit-learn, which need no download.
TRAINING = (
    *("coffee.png", "rocket.jpg", "camera.png", "brick.png", "grass.png", "gravel.png"),
    *("coins.png", "moon.png", "hubble_deep_field.jpg", "retina.jpg", "ihc.png"),
    *("motorcycle_left.png", "motorcycle_right.png", "china.jpg"),
)
"""A scene that is in here has no other picture in :data:`VALIDATION`."""
VALIDATION = ("astronaut.png", "chelsea.png", "flower.jpg")
_OF_SKLEARN = ("china.jpg", "flower.jpg")


def find_photographs(names: tuple[str, ...]) -> list[Path]:
    """The files of :data:`TRAINING` or :data:`VALIDATION`."""
    try:
        import skimage.data
        import sklearn.datasets
    except ImportError as error:
        raise DataError(
            f"the photographs need {error.name}: pip install scikit-image scikit-learn"
        ) from None
    of_skimage = Path(str(skimage.data.__file__)).parent
    of_sklearn = Path(str(sklearn.datasets.__file__)).parent / "images"
    paths = [(of_sklearn if n in _OF_SKLEARN else of_skimage) / n for n in names]
    if missing := [path.name for path in paths if not path.is_file()]:
        raise DataError(f"this version of the package does not include {missing[0]}")
    return paths


def find_pictures(what: str, training: bool) -> list[Path]:
    """The files of a folder (recursively), of a glob, or of ``photographs``."""
    if what == "photographs":
        return find_photographs(TRAINING if training else VALIDATION)
    key = "train_pictures" if training else "val_pictures"
    if not what:
        raise DataError(f"no images: give --{key.replace('_', '-')} a folder or a glob")
    folder = Path(what)
    found = folder.rglob("*") if folder.is_dir() else map(Path, glob.glob(what, recursive=True))
    paths = sorted(p for p in found if has_image_ending(p) and p.is_file())
    if not paths:
        raise DataError(f"{key}: no image at {what}")
    return paths


def load_truth(path: Path, channels: int, scale: int) -> Tensor:
    """A picture as (channels, H, W) in 0 … 1, cropped to multiples of ``scale``."""
    truth = to_tensor(read_picture(path).pixels, channels)
    height, width = (side - side % scale for side in truth.shape[1:])
    if not height or not width:
        raise PictureError(f"{path} is smaller than {scale}×{scale}")
    return truth[:, :height, :width]


def degrade_picture(recipe: RestorationRecipe, truth: Tensor, scale: int, number: int) -> Pair:
    """The model's input and the target for validation picture ``number``, deterministically.

    If there are several noise levels or qualities, pictures cycle through them. ``truth`` is
    (C, H, W) in 0 … 1, with sides that are multiples of ``scale``.
    """
    generator = np.random.default_rng(mix_seed(0, number))
    if recipe.task == "denoise":
        return add_noise(truth, recipe.sigma[number % len(recipe.sigma)], generator), truth
    if recipe.task == "jpeg":
        low, high = recipe.quality
        return compress(truth, low + (high - low) * (number % 4) // 3), truth
    return _degrade(recipe, truth, scale, generator)


def _degrade(
    recipe: RestorationRecipe, truth: Tensor, scale: int, generator: np.random.Generator
) -> Pair:
    if recipe.task == "sr":
        return quantize(resize_bicubic(truth, 1 / scale)), truth
    if recipe.task == "denoise":
        return add_noise(truth, float(generator.choice(recipe.sigma)), generator), truth
    if recipe.task == "jpeg":
        low, high = recipe.quality
        return compress(truth, int(generator.integers(low, high + 1))), truth
    degraded = real_world(truth, scale, generator)
    return degraded, sharpen(truth) if recipe.usm else truth


@dataclass(eq=False)
class Patches(Dataset[Pair]):
    """Pairs (C, p, p) and (C, p·scale, p·scale); unreadable pictures are replaced by others."""

    paths: list[Path]
    recipe: RestorationRecipe
    scale: int
    corrupt: CorruptImages

    def __post_init__(self) -> None:
        self._kept: dict[int, np.ndarray] = {}

    def __getitem__(self, key: Key) -> Pair:
        index, seed = key
        generator = np.random.default_rng(seed)
        pixels = self._read(index % len(self.paths))
        while pixels is None:
            pixels = self._read(int(generator.integers(len(self.paths))))
        return self.cut(pixels, generator)

    def cut(self, pixels: np.ndarray, generator: np.random.Generator) -> Pair:
        """A random patch from (H, W, C) of integers, randomly degraded."""
        scale, side = self.scale, self.recipe.patch_size * self.scale
        rows, columns = ((n // scale) * scale for n in pixels.shape[:2])
        top = int(generator.integers((rows - side) // scale + 1)) * scale
        left = int(generator.integers((columns - side) // scale + 1)) * scale
        symmetry = int(generator.integers(8)) if self.recipe.symmetries else 0
        # The kernel of the bicubic reaches two pixels of the result, and half a pixel more.
        margin = 3 * scale if self.recipe.task == "sr" else 0
        above, before = min(top, margin), min(left, margin)
        region = pixels[
            top - above : min(top + side + margin, rows),
            left - before : min(left + side + margin, columns),
        ]
        truth = to_tensor(region, self.recipe.in_chans)
        patch = _flip(truth[:, above : above + side, before : before + side], symmetry)
        if self.recipe.task != "sr":
            return _degrade(self.recipe, patch, scale, generator)
        small, _ = _degrade(self.recipe, truth, scale, generator)
        row, column, size = above // scale, before // scale, self.recipe.patch_size
        return _flip(small[:, row : row + size, column : column + size], symmetry), patch

    def _read(self, number: int) -> np.ndarray | None:
        if number in self._kept:
            return self._kept[number]
        path, side = self.paths[number], self.recipe.patch_size * self.scale
        try:
            pixels = read_picture(path).pixels
            if min(pixels.shape[:2]) < side:
                raise PictureError(f"smaller than a patch of {side}×{side}")
        except PictureError as error:
            self.corrupt.add(str(path), error, len(self.paths))
            return None
        if self.recipe.cache:
            self._kept[number] = pixels
        return pixels


def _flip(x: Tensor, which: int) -> Tensor:
    """One of the 8 symmetries of the square: bits for flipping rows, columns and the diagonal."""
    axes = [axis for bit, axis in ((1, 1), (2, 2)) if which & bit]
    x = x.flip(axes) if axes else x
    return (x.transpose(1, 2) if which & 4 else x).contiguous()


@dataclass(eq=False)
class PatchLoader(LoaderOwner):
    """Batches of patches, by epoch, which depend only on seed, epoch and position."""

    paths: list[Path]
    recipe: RestorationRecipe
    scale: int
    world: World
    corrupt: CorruptImages

    def __post_init__(self) -> None:
        recipe, world = self.recipe, self.world
        self.batches = batches = recipe.updates_per_epoch * recipe.accum_steps
        # The sampler draws without replacement: as many numbers as patches, modulo the pictures.
        size = batches * recipe.batch_size * world.size
        self._sampler = TrainSampler(size, recipe.batch_size, recipe.seed, world)
        patches = Patches(self.paths, recipe, self.scale, self.corrupt)
        self._loader = self.open(patches, batch_sampler=self._sampler)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Pair]:
        """Pairs (B, C, p, p) and (B, C, p·scale, p·scale) on the device, from ``start`` on."""
        self._sampler.epoch, self._sampler.start = epoch, start
        device = self.world.device
        for degraded, truth in first_batches(self._loader, self.batches - start):
            yield degraded.to(device, non_blocking=True), truth.to(device, non_blocking=True)

    def names(self, epoch: int, update: int) -> list[str]:
        """Names of this process's pictures of an update."""
        indices = self._sampler.images(epoch, update, self.recipe.accum_steps)
        return [str(self.paths[index % len(self.paths)]) for index in indices]
