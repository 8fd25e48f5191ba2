"""Sources of images with a common interface: arrays, files, archives, other libraries."""

from __future__ import annotations

import abc
import io
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image

from backbones.common.images import opened

File = tuple[str, int, int]  # name; offset and length within an archive


class ImageSource(abc.ABC):
    """Images with random access."""

    title = ""  # of the split, for messages
    # Class index of each image, if known without opening it; (N, classes) of 0 and 1 if it has
    # several labels.
    labels: np.ndarray | None = None

    @abc.abstractmethod
    def __len__(self) -> int:
        """The number of images."""

    @abc.abstractmethod
    def load(self, index: int) -> tuple[Image.Image, Any]:
        """The image, in any mode, and its class or labels. OSError if it cannot be decoded."""

    def name(self, index: int) -> str:
        """The image's name for messages."""
        return f"{self.title}[{index}]"


class ArraySource(ImageSource):
    """Images (N, H, W) or (N, H, W, 3) of uint8 in memory."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, title: str) -> None:
        self.images, self.labels, self.title = images, labels, title

    def __len__(self) -> int:
        return len(self.images)

    def load(self, index: int) -> tuple[Image.Image, Any]:
        assert self.labels is not None
        label = self.labels[index]
        return Image.fromarray(self.images[index]), label if label.ndim else int(label)


class FileSource(ImageSource):
    """Image files, or members of an uncompressed tar archive."""

    def __init__(self, path: Path, files: list[File], labels: np.ndarray) -> None:
        self.archive = path if path.is_file() else None
        self.files, self.labels = files, labels

    def __len__(self) -> int:
        return len(self.files)

    def load(self, index: int) -> tuple[Image.Image, int]:
        name, offset, length = self.files[index]
        # Opened for each image, since forked loader processes would share a handle's position.
        with open(self.archive or name, "rb") as file:
            file.seek(offset)
            data = file.read(length) if self.archive else file.read()
        assert self.labels is not None
        return decode(io.BytesIO(data)), int(self.labels[index])

    def name(self, index: int) -> str:
        return self.files[index][0]


class ReaderSource(ImageSource):
    """A timm reader."""

    def __init__(self, reader: Any) -> None:
        self.reader = reader
        self.labels = np.fromiter(reader.iter_targets(), np.int64, len(reader))

    def __len__(self) -> int:
        return len(self.reader)

    def load(self, index: int) -> tuple[Image.Image, int]:
        file, label = self.reader[index]
        return decode(file), int(label)

    def name(self, index: int) -> str:
        return f"{self.reader.filename(index) or self.reader.split}[{index}]"


class TorchvisionSource(ImageSource):
    """A data set of ``torchvision.datasets``."""

    def __init__(self, dataset: Any, title: str) -> None:
        self.dataset, self.title = dataset, title
        if hasattr(dataset, "loader"):  # of files; torchvision's own would clip 16 bits
            dataset.loader = _decode_path
        if hasattr(dataset, "targets"):
            self.labels = np.asarray(dataset.targets)

    def __len__(self) -> int:
        return len(self.dataset)

    def load(self, index: int) -> tuple[Image.Image, int]:
        image, label = self.dataset[index]
        return image, int(label)


def _decode_path(path: str) -> Image.Image:
    return decode(open(path, "rb"))  # noqa: SIM115 - decoding closes it


def decode(file: IO[bytes]) -> Image.Image:
    """The image in an open file, in any mode; closes the file."""
    with file, opened(file) as image:
        image.load()
        return image
