"""Opens and checks the training and validation images of ``--data``."""

from __future__ import annotations

import os
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from timm.data import create_dataset
from timm.data.readers import create_reader

from backbones.common.errors import DataError
from backbones.common.images import has_image_ending, list_below
from backbones.core.download import fetch
from backbones.core.messages import first_line, shown
from backbones.training.recipe import Recipe
from backbones.training.sources import (
    ArraySource,
    File,
    FileSource,
    ImageSource,
    ReaderSource,
    TorchvisionSource,
)
from backbones.training.streams import StreamSource, missing_shards

__all__ = ["Splits", "list_tar", "open_splits"]

_MEDMNIST_URL = "https://zenodo.org/records/10519652/files/{}.npz"
# Exceptions of timm, torchvision and datasets for unknown names, splits or files.
_READER_ERRORS = (AssertionError, LookupError, OSError, RuntimeError, TypeError, ValueError)
_FOLDER_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid", "eval", "test"),
}


@dataclass
class Splits:
    """The two halves of a data set.

    Attributes:
        train, validation: the images.
        classes: their names, by class number.
        train_size, validation_size: number of images.
        multi_label: labels are (N, classes) of 0 and 1.
    """

    train: ImageSource | StreamSource
    validation: ImageSource | StreamSource
    classes: list[str]
    train_size: int
    validation_size: int
    multi_label: bool = False

    def head_size(self, recipe: Recipe) -> int:
        """The number of classes of the model: the recipe's, or else the data's."""
        return len(self.classes) if recipe.num_classes is None else recipe.num_classes


def open_splits(recipe: Recipe) -> Splits:
    """Open ``recipe.data`` and check it.

    Raises:
        DataError: no data, a missing split, an empty class folder, a label out of range, or splits
            with different classes.
    """
    kind, _, rest = recipe.data.partition("/")
    if not recipe.data:
        raise DataError("no data: give --data a folder, digits, medmnist/NAME, torch/NAME, …")
    if kind == "digits" and not rest:
        splits = _digits()
    elif kind == "medmnist":
        splits = _medmnist(recipe, rest)
    elif kind in ("torch", "torchvision"):
        splits = _torchvision(recipe, rest)
    elif kind == "hfds":
        splits = _hugging_face(recipe)
    elif kind in ("wds", "hfids"):
        return _streams(recipe, kind, rest)
    else:
        splits = _folder(recipe, Path(recipe.data))
    _check(splits, recipe)
    return splits


def _from_sources(train: ImageSource, validation: ImageSource, classes: Sequence[str]) -> Splits:
    return Splits(train, validation, list(classes), len(train), len(validation))


def _digits() -> Splits:
    """scikit-learn's 1797 handwritten digits of 8×8 pixels; a fifth of each class is held out."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise DataError("--data digits needs scikit-learn: pip install scikit-learn") from None
    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)  # (1797, 8, 8), from 0..16
    labels = digits.target.astype(np.int64)
    rank_in_class = np.zeros(len(labels), dtype=np.int64)
    for number in range(10):
        rank_in_class[labels == number] = np.arange((labels == number).sum())
    held_out = rank_in_class % 5 == 4
    return _from_sources(
        ArraySource(images[~held_out], labels[~held_out], "digits/train"),
        ArraySource(images[held_out], labels[held_out], "digits/validation"),
        [str(number) for number in range(10)],
    )


def _medmnist(recipe: Recipe, name: str) -> Splits:
    """The official splits of a MedMNIST set, from the ``.npz`` that its authors publish."""
    path = Path(recipe.data_dir or "data") / f"{name}.npz"
    url = _MEDMNIST_URL.format(name)
    if not path.exists():
        if not recipe.download:
            raise DataError(f"{path} is missing: download it from {url}, or add --download")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            fetch(url, path)
        except OSError as error:
            raise DataError(str(error)) from error
    try:
        # Opened here, because NumPy does not close a damaged file.
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in archive.files}
    except (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path} is not a MedMNIST file: {first_line(error)}") from error
    sources = []
    for split in (recipe.train_split, recipe.val_split):
        short = "val" if split in _FOLDER_NAMES["validation"][:4] else split
        if f"{short}_images" not in arrays or f"{short}_labels" not in arrays:
            raise DataError(f"{path} has no split {split!r}; it has train, val and test")
        images, labels = arrays[f"{short}_images"], arrays[f"{short}_labels"]
        if images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[3] != 3):
            raise DataError(f"{name} has images of shape {images.shape[1:]}, not 2D ones")
        if len(images) != len(labels):
            raise DataError(f"{path}: {len(images)} {short} images have {len(labels)} labels")
        if labels.ndim != 2 or labels.shape[1] == 1:
            labels = labels.reshape(-1)
        sources.append(ArraySource(images, labels.astype(np.int64), f"{name}/{short}"))
    several = labels.ndim == 2
    count = labels.shape[1] if several else int(arrays["train_labels"].max()) + 1
    splits = _from_sources(sources[0], sources[1], [str(number) for number in range(count)])
    splits.multi_label = several
    return splits


def _torchvision(recipe: Recipe, name: str) -> Splits:
    """A set of ``torchvision.datasets``, by timm's short names such as ``cifar10``."""
    sources: list[ImageSource] = []
    classes: list[str] = []
    root = recipe.data_dir or "data"
    for split in (recipe.train_split, recipe.val_split):
        try:
            dataset = create_dataset(
                f"torch/{name}", root=root, split=split, download=recipe.download
            )
        except _READER_ERRORS as error:
            raise DataError(
                f"torch/{name}, split {split!r}: {first_line(error)} "
                f"(looked in {root}, see --data-dir)"
            ) from error
        sources.append(TorchvisionSource(dataset, f"{name}/{split}"))
        classes = [str(c) for c in getattr(dataset, "classes", [])] or classes
    return _from_sources(sources[0], sources[1], classes)


def _hugging_face(recipe: Recipe) -> Splits:
    """A data set of the Hugging Face hub, or a folder in its formats, with timm's reader."""
    readers = [_reader(recipe, split) for split in (recipe.train_split, recipe.val_split)]
    names = {number: str(name) for name, number in readers[0].class_to_idx.items()}
    train, validation = (ReaderSource(reader) for reader in readers)
    assert train.labels is not None
    count = max(names, default=int(train.labels.max())) + 1
    return _from_sources(train, validation, [names.get(i, str(i)) for i in range(count)])


def _reader(recipe: Recipe, split: str) -> Any:
    options = {"input_key": recipe.input_key, "target_key": recipe.target_key}
    try:
        return create_reader(
            recipe.data, root=recipe.data_dir, split=split, class_map=_class_map(recipe), **options
        )
    except ImportError as error:
        raise DataError(f"{recipe.data} needs a package: {error}") from error
    except _READER_ERRORS as error:
        raise DataError(f"{recipe.data}, split {split!r}: {first_line(error)}") from error


def _streams(recipe: Recipe, kind: str, rest: str) -> Splits:
    """WebDataset shards or a streamed hub data set, which can only be read in order."""
    if kind == "wds":
        name, root = "wds/", os.path.join(recipe.data_dir or "", rest)
    else:
        name, root = recipe.data, recipe.data_dir  # type: ignore[assignment]

    classes_by_name = _class_map(recipe)

    def opener(split: str, training: bool, size: int | None) -> Callable[[], Any]:
        def open_stream() -> Any:
            return create_dataset(
                name,
                root=root,
                split=split,
                is_training=training,
                batch_size=recipe.batch_size,
                num_samples=size,
                seed=recipe.seed,
                class_map=classes_by_name,
                input_img_mode="",  # as in the file: timm would clip 16 bits
                input_key=recipe.input_key,
                target_key=recipe.target_key,
                download=recipe.download and kind == "hfids",
            )

        return open_stream

    train = opener(recipe.train_split, True, recipe.num_samples)
    validation = opener(recipe.val_split, False, recipe.val_num_samples)
    sizes: list[int] = []
    for split, stream in ((recipe.train_split, train), (recipe.val_split, validation)):
        try:
            reader = stream().reader
        except ImportError as error:
            raise DataError(f"{recipe.data} needs a package: {error}") from error
        except _READER_ERRORS as error:
            raise DataError(f"{recipe.data}, split {split!r}: {first_line(error)}") from error
        if not reader.num_samples:
            raise DataError(
                f"{recipe.data}, split {split!r}: unknown length; append it to the shards as "
                f"'{split}|COUNT', or give num_samples and val_num_samples"
            )
        missing = missing_shards(reader) if kind == "wds" else []
        if missing:
            raise DataError(f"{recipe.data}, split {split!r}: there is no shard {missing[0]}")
        sizes.append(int(reader.num_samples))
    names = {number: str(name) for name, number in (reader.class_to_idx or {}).items()}
    if not names and recipe.num_classes is None:
        raise DataError(f"{recipe.data} does not state its number of classes: give --num-classes")
    count = max(names) + 1 if names else recipe.num_classes
    assert count is not None
    classes = [names.get(number, str(number)) for number in range(count)]
    sources = [
        StreamSource(stream, size, count if recipe.num_classes is None else recipe.num_classes)
        for stream, size in zip((train, validation), sizes, strict=True)
    ]
    return Splits(sources[0], sources[1], classes, sizes[0], sizes[1])


def _folder(recipe: Recipe, root: Path) -> Splits:
    """``root/train/CLASS/…`` and ``root/validation/CLASS/…``, or ``train.tar`` and so on."""
    if not root.is_dir():
        raise DataError(f"no data at {root}: it must be a folder with train and validation")
    class_to_idx = _class_map(recipe)
    sources = []
    for split in (recipe.train_split, recipe.val_split):
        path = _find_split(root, split)
        files = list_tar(path) if path.is_file() else _list_folder(path)
        if not files:
            raise DataError(f"no images in {path}")
        if class_to_idx is None:
            class_to_idx = {name: i for i, name in enumerate(sorted({c for c, _ in files}))}
        unknown = sorted({c for c, _ in files} - set(class_to_idx))
        if unknown:
            raise DataError(f"{path} has classes that training lacks: {', '.join(unknown[:5])}")
        labels = np.array([class_to_idx[c] for c, _ in files])
        sources.append(FileSource(path, [file for _, file in files], labels))
    assert class_to_idx is not None
    names = {number: name for name, number in class_to_idx.items()}
    classes = [names.get(number, str(number)) for number in range(max(names) + 1)]
    return _from_sources(sources[0], sources[1], classes)


def _find_split(root: Path, split: str) -> Path:
    names = next((names for names in _FOLDER_NAMES.values() if split in names), (split,))
    for name in dict.fromkeys((split, *names)):
        for path in (root / name, root / f"{name}.tar"):
            if path.exists():
                return path
    raise DataError(f"{root} has no split {split!r}: there is neither {' nor '.join(names)} in it")


def _list_folder(root: Path) -> list[tuple[str, File]]:
    folders = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    files: list[tuple[str, File]] = []
    for folder in folders:
        below = list_below(folder)
        if not below.images:
            held = f"has no images, but {below.others[0]}" if below.others else "is empty"
            raise DataError(f"the class folder {folder} {held}")
        files += [(folder.name, (str(folder / name), 0, 0)) for name in below.images]
    return files


def list_tar(
    path: Path, damage: list[str] | None = None, skipped: list[str] | None = None
) -> list[tuple[str, File]]:
    """The images of an uncompressed archive, each after its class, the folder that holds it.

    Args:
        damage: gets a sentence where the archive breaks off; None makes an error of it.
        skipped: gets the names of the members that are no images, except for folders.

    Raises:
        DataError: it is no uncompressed tar file.
    """
    files = []
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                inner = Path(member.name)
                if member.isfile() and has_image_ending(inner):
                    files.append(
                        (inner.parent.name, (member.name, member.offset_data, member.size))
                    )
                elif skipped is not None and not member.isdir():
                    skipped.append(member.name)
    except (tarfile.TarError, OSError) as error:
        problem = f"{path} is not an uncompressed tar file: {error}"
        if damage is None:
            raise DataError(problem) from error
        damage.append(problem)
    return sorted(files, key=lambda entry: entry[1][0])


def _class_map(recipe: Recipe) -> dict[str, int] | None:
    """Class indices by name, from a text file with one name per line; None if not given.

    timm would read some files as pickles, which may execute code.
    """
    path = recipe.class_map
    if path is None:
        return None
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise DataError(f"cannot read class_map {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise DataError(f"class_map {path} is not a text file with one class per line") from None
    numbers: dict[str, int] = {}
    for number, line in enumerate(lines):
        name = line.strip()
        if name in numbers:
            lines_of_it = f"lines {numbers[name] + 1} and {number + 1}"
            raise DataError(f"class_map {path} has {shown(name)} twice, in {lines_of_it}")
        if name:
            numbers[name] = number
    if not numbers:
        raise DataError(f"class_map {path} is empty")
    return numbers


def _check(splits: Splits, recipe: Recipe) -> None:
    count = splits.head_size(recipe)
    if len(splits.classes) > count:
        raise DataError(
            f"{recipe.data} has {len(splits.classes)} classes, the model's head only {count}: "
            "leave num_classes out, or raise it"
        )
    for split, source in (("training", splits.train), ("validation", splits.validation)):
        if not isinstance(source, ImageSource):
            continue
        if len(source) == 0:
            raise DataError(f"{recipe.data}: the {split} split is empty")
        if source.labels is None:
            continue
        if splits.multi_label:
            if set(np.unique(source.labels)) - {0, 1}:
                raise DataError(f"{recipe.data}: the {split} split has labels other than 0 and 1")
            if split == "validation" and not np.ptp(source.labels, axis=0).any():
                raise DataError(
                    f"{recipe.data}: no class is on some validation images and off on others, so "
                    "there is no AUC"
                )
            continue
        wrong = np.flatnonzero((source.labels < 0) | (source.labels >= count))
        if len(wrong):
            i = int(wrong[0])
            raise DataError(
                f"{recipe.data}: {source.name(i)} has label {source.labels[i]}, outside the "
                f"{count} classes 0..{count - 1}"
            )
