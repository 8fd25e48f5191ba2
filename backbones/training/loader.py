"""Data loaders whose batches depend only on seed, epoch and position, so runs can be resumed."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from timm.data import create_transform
from timm.data.auto_augment import AugmentOp
from timm.data.loader import PrefetchLoader, fast_collate
from torch.utils.data import DataLoader, Dataset

from backbones.common.errors import DataError
from backbones.common.generators import mix_seed, seeded
from backbones.common.images import DECODE_ERRORS, as_8_bits
from backbones.common.processes import World
from backbones.common.resizing import Resizing
from backbones.data.batches import LoaderOwner, first_batches
from backbones.data.corrupt import CorruptImages
from backbones.data.sampler import NO_LABEL, Key, TrainSampler, ValidationSampler
from backbones.data.sources import ImageSource
from backbones.data.streams import StreamImages, StreamSource
from backbones.training.recipe import Recipe

# Keys that are arguments of timm's training transform, too.
_TRANSFORM_KEYS = (
    *("no_aug", "train_crop_mode", "scale", "ratio", "hflip", "vflip"),
    *("grayscale_prob", "gaussian_blur_prob"),
)


@dataclass(eq=False)
class _ImageLoader(LoaderOwner):
    """The images of a source as batches on the device, preprocessed by timm's ``config``."""

    source: ImageSource | StreamSource
    config: dict[str, Any]
    recipe: Recipe
    world: World
    corrupt: CorruptImages
    collate = staticmethod(fast_collate)

    @property
    def mode(self) -> str:
        """Of Pillow's images."""
        return "L" if self.recipe.in_chans == 1 else "RGB"

    def on_device(self, batches: Iterable[Any]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Normalised images (B, C, H, W) and labels (B,)."""
        stats = {"mean": self.config["mean"], "std": self.config["std"]}
        channels = self.config["input_size"][0]
        return iter(PrefetchLoader(batches, channels=channels, device=self.world.device, **stats))


@dataclass(eq=False)
class TrainLoader(_ImageLoader):
    """Shuffled, augmented training batches, by epoch.

    Every process gets the same number of batches of the same size; the remainder of the images is
    dropped, and differs from epoch to epoch.
    """

    def __post_init__(self) -> None:
        recipe, world, size = self.recipe, self.world, len(self.source)
        self.batches = size // (recipe.batch_size * world.size)
        if self.batches < recipe.accum_steps:
            raise DataError(
                f"{size} images do not fill {recipe.accum_steps} batch(es) of "
                f"{recipe.batch_size} for {world.size} process(es): lower batch_size or accum_steps"
            )
        repeats = max(1, recipe.aug_repeats)
        self._sampler = TrainSampler(size, recipe.batch_size, recipe.seed, world, repeats)
        self._loader_size = 0  # of the images, in pixels

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The batches of one epoch, from ``start`` on."""
        if isinstance(self.source, ImageSource):
            self._sampler.epoch, self._sampler.start = epoch, start
            batches = first_batches(self._map_loader(epoch), self.batches - start)
        else:
            self._loader = self._stream_loader(epoch)
            batches = first_batches(self._loader, self.batches, skip=start)
        return self.on_device(batches)

    def blank(
        self, size: int, multi_label: bool, num_classes: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A batch of zeros (B, C, size, size) with labels, in the format of :meth:`epoch`."""
        batch, device = self.recipe.batch_size, self.world.device
        shape = (batch, num_classes) if multi_label else (batch,)
        images = torch.zeros(batch, self.recipe.in_chans, size, size, device=device)
        return images, torch.zeros(shape, dtype=torch.int64, device=device)

    def names(self, epoch: int, update: int) -> list[str]:
        """Names of this process's images of an update; not available for streams."""
        if not isinstance(self.source, ImageSource):
            return ["(a stream does not name its images)"]
        indices = self._sampler.images(epoch, update, self.recipe.accum_steps)
        return [self.source.name(index) for index in indices]

    def _image_size(self, epoch: int) -> int:
        """The image size of an epoch: the schedule's, or else the model's."""
        sizes = {-1: int(self.config["input_size"][-1]), **self.recipe.img_size_schedule}
        return sizes[max(first for first in sizes if first <= epoch)]

    def _map_loader(self, epoch: int) -> DataLoader[Any]:
        size = self._image_size(epoch)
        if self._loader is None or self._loader_size != size:
            self._loader = None  # ends the workers of the size before
            assert isinstance(self.source, ImageSource)
            args = self._transform(size), self.mode, self.corrupt
            images = _Images(self.source, *args, training=True)
            self._loader, self._loader_size = self.open(images, batch_sampler=self._sampler), size
        return self._loader

    def _stream_loader(self, epoch: int) -> DataLoader[Any]:
        # A stream's readers keep state between epochs; new ones make epochs reproducible.
        assert isinstance(self.source, StreamSource)
        stream = self.source.open()
        stream.set_epoch(epoch)
        stream.set_loader_cfg(num_workers=self.recipe.workers)
        seed = mix_seed(self.recipe.seed, epoch, self.world.rank)
        args = stream, self._transform(self._image_size(epoch)), self.mode, self.corrupt, seed
        generator = torch.Generator().manual_seed(seed)
        options = {"batch_size": self.recipe.batch_size, "drop_last": True, "generator": generator}
        return self.open(StreamImages(self.source, *args), **options)

    def _transform(self, image_size: int) -> Callable[[Any], torch.Tensor]:
        """timm's training transform up to uint8; normalisation and erasing run on the device."""
        recipe = self.recipe
        transform: Callable[[Any], torch.Tensor] = create_transform(
            (recipe.in_chans, image_size, image_size),
            is_training=True,
            **{key: getattr(recipe, key) for key in _TRANSFORM_KEYS},
            color_jitter=recipe.color_jitter if recipe.in_chans == 3 else 0.0,
            auto_augment=recipe.aa,
            interpolation=recipe.train_interpolation,
            mean=self.config["mean"],
            std=self.config["std"],
            use_prefetcher=True,
        )
        allow_zero_bits(transform)
        return transform


@dataclass(eq=False)
class ValidationLoader(_ImageLoader):
    """Every validation image exactly once over all processes, in order.

    Every process gets the same number of batches; padding and unreadable images have the label
    :data:`NO_LABEL`. (For streams, the number may differ by one, see ``equal_batches``.)
    ``corruption`` is applied to every image at its final size.
    """

    corruption: Callable[[Image.Image], Image.Image] | None = None

    def __post_init__(self) -> None:
        self.batch_size = self.recipe.val_batch_size or self.recipe.batch_size
        size = len(self.source)
        self.batches = -(-size // (self.batch_size * self.world.size))
        self.equal_batches = isinstance(self.source, ImageSource) or self.world.size == 1
        self._transform: Any = Resizing(self.config)
        if self.corruption is not None:
            self._transform = create_transform(
                **self.config, is_training=False, use_prefetcher=True
            )
            self._transform.transforms.insert(-1, self.corruption)  # before the array is made
        if isinstance(self.source, ImageSource):
            args = self._transform, self.mode, self.corrupt
            sampler = ValidationSampler(size, self.batch_size, self.batches, self.world)
            images = _Images(self.source, *args, training=False)
            self._loader = self.open(images, batch_sampler=sampler)

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        if self._loader is not None:
            return self.on_device(first_batches(self._loader, self.batches))
        assert isinstance(self.source, StreamSource)
        stream = self.source.open()
        # Every process reads all and keeps its share: shards do not split into equal parts.
        stream.reader.dist_rank, stream.reader.dist_num_replicas = 0, 1
        stream.set_loader_cfg(num_workers=1)
        args = stream, self._transform, self.mode, self.corrupt
        images = StreamImages(self.source, *args, share=self.world)
        here: dict[str, Any] = {"num_workers": 0, "persistent_workers": False}
        return self.on_device(self.open(images, batch_size=self.batch_size, **here))


@dataclass(eq=False)
class _Images(Dataset[tuple[torch.Tensor, int]]):
    """Decode, convert, augment. Unreadable training images are replaced by others."""

    source: ImageSource
    transform: Callable[[Any], Any]
    mode: str
    corrupt: CorruptImages
    training: bool

    def __getitem__(self, key: Key) -> tuple[torch.Tensor, Any]:
        index, seed = key
        if not self.training:
            blank = Image.new(self.mode, (256, 256)), self._no_label()
            image, label = self._read(index) or blank
            return self.transform(image), blank[1] if seed == NO_LABEL else label
        with seeded(seed):
            sample = self._read(index)
            while sample is None:
                sample = self._read(random.randrange(len(self.source)))
            image, label = sample
            return self.transform(image), label

    def _no_label(self) -> Any:
        labels = self.source.labels
        return NO_LABEL if labels is None or labels.ndim == 1 else np.full_like(labels[0], NO_LABEL)

    def _read(self, index: int) -> tuple[Any, Any] | None:
        try:
            image, label = self.source.load(index)
            image = as_8_bits(image, self.mode)
        except DECODE_ERRORS as error:
            self.corrupt.add(self.source.name(index), error, len(self.source))
            return None
        return image, label


def allow_zero_bits(transform: Any) -> None:
    """Let every posterizing operation in a timm transform (a ``Compose``) accept 0 bits.

    RandAugment uses them at its highest magnitude, and Pillow 13 rejects them. The published
    recipes were trained with versions that returned a black image, as is done here.
    """
    for step in transform.transforms:
        for operation in getattr(step, "ops", None) or sum(getattr(step, "policy", []), []):
            if isinstance(operation, AugmentOp) and operation.name.startswith("Posterize"):
                operation.aug_fn = _posterize


def _posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    if bits >= 8:
        return image
    return ImageOps.posterize(image, bits) if bits > 0 else Image.new(image.mode, image.size)
