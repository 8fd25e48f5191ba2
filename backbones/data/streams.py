"""Sources without random access: WebDataset shards and streamed hub data sets."""

from __future__ import annotations

import importlib
import io
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils.data import IterableDataset, get_worker_info

from backbones.common.errors import DataError
from backbones.common.generators import mix_seed, seeded
from backbones.common.images import DECODE_ERRORS, as_8_bits, opened
from backbones.common.processes import World
from backbones.data.corrupt import CorruptImages
from backbones.data.sources import decode


@dataclass(frozen=True)
class StreamSource:
    """A stream of ``size`` images, as stated, that can be opened repeatedly."""

    open: Callable[[], Any]
    """Returns a timm ``IterableImageDataset``."""
    size: int
    num_classes: int

    def __len__(self) -> int:
        return self.size


@dataclass(eq=False)
class StreamImages(IterableDataset[tuple[torch.Tensor, int]]):
    """Decode, convert, augment. Unreadable training images are replaced by others.

    ``stream`` is ``source``, opened. The augmentation is seeded by ``seed``, None for validation,
    and the position. Of the images, this process's ``share`` is kept.
    """

    source: StreamSource
    stream: Any
    transform: Callable[[Any], torch.Tensor]
    mode: str
    corrupt: CorruptImages
    seed: int | None = None
    share: World | None = None

    def __iter__(self) -> Iterator[tuple[torch.Tensor, int]]:
        """Augmented images and their classes."""
        reader = self.stream.reader
        try:
            if hasattr(reader, "split_info"):
                _watch_shards(reader, self._note)
            else:
                _disable_decoding(reader)
        except RuntimeError as error:  # fewer shards than loader processes
            raise DataError(str(error)) from error
        worker = get_worker_info()
        worker_id = worker.id if worker else 0
        for position, (image, label) in enumerate(self._readable()):
            if self.seed is None:
                yield self.transform(image), label
                continue
            with seeded(mix_seed(self.seed, worker_id, position)):
                sample = self.transform(image)
            yield sample, label

    def _readable(self) -> Iterator[tuple[Image.Image, int]]:
        """Images and labels; in training, unreadable images are replaced by the last good one."""
        good, owed = None, 0
        for position, (image, label) in enumerate(self.stream):
            if self.share is not None and position % self.share.size != self.share.rank:
                continue
            if not 0 <= int(label) < (count := self.source.num_classes):
                raise DataError(
                    f"image {position} of the stream has label {label}, outside the {count} "
                    f"classes 0..{count - 1}"
                )
            try:
                good = self._decode(image), int(label)
            except DECODE_ERRORS as error:
                self._note(_name(image), error)
                owed += self.seed is not None
            else:
                owed += 1
            while owed and good is not None:
                owed -= 1
                yield good

    def _decode(self, image: Any) -> Image.Image:
        if isinstance(image, dict):
            data = image["bytes"] or Path(image["path"]).read_bytes()
            image = decode(io.BytesIO(data))
        return as_8_bits(image, self.mode)

    def _note(self, name: str, error: Exception) -> bool:
        self.corrupt.add(name, error, self.source.size)
        return True  # tells webdataset to go on


def _watch_shards(reader: Any, note: Callable[[str, Exception], bool]) -> None:
    """Report images that timm's WebDataset reader would silently skip to ``note``, by name."""
    shards = len(reader.split_info.filenames)
    reader._lazy_init()
    if reader.is_training and shards < reader.global_num_workers:
        raise DataError(
            f"{shards} shard(s) are too few for {reader.global_num_workers} loader processes "
            f"({reader.num_workers} per process): lower workers, or make more shards"
        )
    *before, decoding, renaming = reader.ds.pipeline
    at = [""]

    def remember(samples: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for sample in samples:
            at[0] = f"{sample['__url__']}/{sample['__key__']}"
            yield sample

    def note_shard(error: Exception) -> bool:
        if isinstance(error, DataError):  # our own, on its way out through nested stages
            raise error
        return note(str(error.args[-1]), error)  # webdataset adds the name of the shard

    for stage in before:
        if "handler" in getattr(stage, "kw", {}):
            stage.kw["handler"] = note_shard
    decode_sample, *rest = decoding.args
    keys = decode_sample.keywords["image_key"].split(";")

    def decode_ours(sample: dict[str, Any]) -> Any:
        for data in (sample[key] for key in keys if key in sample):
            opened(io.BytesIO(data)).close()  # timm's would open any format
        return decode_sample(sample)

    decoding.args = decode_ours, *rest
    decoding.kw["handler"] = lambda error: note(at[0], error)
    reader.ds.pipeline = [*before, remember, decoding, renaming]


def _disable_decoding(reader: Any) -> None:
    """Let timm's hub reader return undecoded files, since decoding errors would end the stream."""
    feature = importlib.import_module("datasets").Image(decode=False)  # an extra

    reader._lazy_init()
    reader.ds = reader.ds.cast_column(reader.input_key, feature)
    reader.input_img_mode = ""


def _name(image: Any) -> str:
    if isinstance(image, dict):
        return image["path"] or f"(image of CRC {zlib.crc32(image['bytes']):08x})"
    return "(an image of the stream)"
