"""Opens and checks the splits of a data set by its name."""

from __future__ import annotations

import contextlib
import functools
import os
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from timm.data import create_dataset
from timm.data.readers import create_reader

from backbones.common.download import fetch
from backbones.common.errors import DataError
from backbones.common.images import has_image_ending, list_below
from backbones.common.keys import Range, key
from backbones.common.messages import first_line, shown
from backbones.data.sources import (
    ArraySource,
    File,
    FileSource,
    ImageSource,
    ReaderSource,
    TorchvisionSource,
)
from backbones.data.streams import StreamSource

_MEDMNIST_URL = "https://zenodo.org/records/10519652/files/{}.npz"
_COUNT = Range(low=1, high=10**6)
_FOLDER_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid", "eval", "test"),
}


@dataclass
class Splits:
    """The two halves of a data set, and the names of the classes, by number."""

    train: ImageSource | StreamSource
    validation: ImageSource | StreamSource
    classes: list[str]
    num_classes: int  # of the model's head
    multi_label: bool = False  # labels are (N, classes) of 0 and 1


@dataclass
class DataKeys:
    """The keys of a recipe that say which images a network is trained on, and how many at once."""

    num_classes: int | None = key("model", None, "None: as many as the data has", _COUNT)
    data: str = key(
        "data",
        "",
        "folder of train/ and val/ (or .tar files), digits, medmnist/NAME, torch/NAME, "
        "wds/FOLDER, hfds/NAME, hfids/NAME",
    )
    data_dir: str | None = key("data", None, "where medmnist/, torch/, hfds/, hfids/ keep files")
    train_split: str = key("data", "train", "name (wds: shard pattern) of the training split")
    val_split: str = key("data", "validation", "name (wds: shard pattern) of the validation split")
    num_samples: int | None = key(
        *("data", None, "number of training images, if the source lacks it"),
        Range(low=1, high=10**12),
    )
    val_num_samples: int | None = key(
        "data", None, "the same for validation", Range(low=1, high=10**12)
    )
    class_map: str | None = key("data", None, "file that maps class names to numbers")
    input_key: str | None = key("data", None, "image column or suffix (hfds, hfids, wds)")
    target_key: str | None = key("data", None, "label column or field (hfds, hfids, wds)")
    download: bool = key("data", False, "let the source download its files")
    batch_size: int = key("data", 128, "images per step and process", _COUNT)
    seed: int = key("run", 42, "seed of all random numbers", Range(low=0, high=2**31 - 1))


def open_splits(keys: DataKeys) -> Splits:
    """Open both splits of a data set and check them."""
    if not keys.data:
        raise DataError("no data: give --data a folder, digits, medmnist/NAME, torch/NAME, …")
    if keys.data.partition("/")[0] in ("wds", "hfids"):
        return _streams(keys)
    train, classes = _open(keys, keys.train_split)
    validation, _ = _open(keys, keys.val_split, classes)
    count = len(classes) if keys.num_classes is None else keys.num_classes
    splits = Splits(train, validation, classes, count)
    splits.multi_label = train.labels is not None and train.labels.ndim == 2
    _check(splits, keys.data)
    return splits


def open_split(
    data: str, split: str = "train", column: str | None = None, folder: str | None = None
) -> ImageSource:
    """Open one split of ``digits``, ``medmnist/NAME``, ``torch/NAME`` or ``hfds/NAME``.

    ``column`` is that of the images (``hfds``); the data set's files are in ``folder``.
    """
    source, _ = _open(DataKeys(data=data, data_dir=folder, input_key=column), split)
    if not len(source):
        raise DataError(f"{data}: the split {split} is empty")
    return source


def _open(
    keys: DataKeys, split: str, known: Sequence[str] | None = None
) -> tuple[ImageSource, list[str]]:
    """The images of a split and its class names; ``known`` are those of the training split."""
    kind, _, rest = keys.data.partition("/")
    if kind == "digits" and not rest:
        return _digits(split)
    if kind == "medmnist":
        return _medmnist(keys, rest, split)
    if kind in ("torch", "torchvision"):
        return _torchvision(keys, rest, split)
    if kind == "hfds":
        return _hugging_face(keys, split)
    return _folder(keys, Path(keys.data), split, known)


@contextlib.contextmanager
def _explained(keys: DataKeys, split: str, hint: str = "") -> Iterator[None]:
    """Raise a DataError for exceptions of timm, torchvision and datasets."""
    try:
        yield
    except ImportError as error:
        raise DataError(f"{keys.data} needs a package: {error}") from error
    # For unknown names, splits or files.
    except (AssertionError, LookupError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise DataError(f"{keys.data}, split {split!r}: {first_line(error)}{hint}") from error


def _digits(split: str) -> tuple[ImageSource, list[str]]:
    """scikit-learn's 1797 handwritten digits of 8×8 pixels; a fifth of each class is held out."""
    if split not in ("train", "validation"):
        raise DataError(f"digits has the splits train and validation, not {split!r}")
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
    kept = (rank_in_class % 5 == 4) == (split == "validation")
    source = ArraySource(images[kept], labels[kept], f"digits/{split}")
    return source, [str(number) for number in range(10)]


def _medmnist(keys: DataKeys, name: str, split: str) -> tuple[ImageSource, list[str]]:
    """An official split of a MedMNIST set, from the ``.npz`` that its authors publish."""
    path = Path(keys.data_dir or "data") / f"{name}.npz"
    url = _MEDMNIST_URL.format(name)
    if not path.exists():
        if not keys.download:
            raise DataError(f"{path} is missing: download it from {url}, or add --download")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            fetch(url, path)
        except OSError as error:
            raise DataError(str(error)) from error
    short = "val" if split in _FOLDER_NAMES["validation"][:4] else split
    wanted = (f"{short}_images", f"{short}_labels", "train_labels")
    try:
        # Opened here, because NumPy does not close a damaged file.
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in wanted if key in archive.files}
    except (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path} is not a MedMNIST file: {first_line(error)}") from error
    if len(arrays) < len(set(wanted)):
        raise DataError(f"{path} has no split {split!r}; it has train, val and test")
    images, labels = arrays[wanted[0]], arrays[wanted[1]]
    if images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[3] != 3):
        raise DataError(f"{name} has images of shape {images.shape[1:]}, not 2D ones")
    if len(images) != len(labels):
        raise DataError(f"{path}: {len(images)} {short} images have {len(labels)} labels")
    if labels.ndim != 2 or labels.shape[1] == 1:
        labels = labels.reshape(-1)
    count = labels.shape[1] if labels.ndim == 2 else int(arrays["train_labels"].max()) + 1
    source = ArraySource(images, labels.astype(np.int64), f"{name}/{short}")
    return source, [str(number) for number in range(count)]


def _torchvision(keys: DataKeys, name: str, split: str) -> tuple[ImageSource, list[str]]:
    """A split of ``torchvision.datasets``, by timm's short names such as ``cifar10``."""
    root = keys.data_dir or "data"
    with _explained(keys, split, f" (looked in {root}, see --data-dir)"):
        dataset = create_dataset(f"torch/{name}", root=root, split=split, download=keys.download)
    classes = [str(c) for c in getattr(dataset, "classes", [])]
    return TorchvisionSource(dataset, f"{name}/{split}"), classes


def _hugging_face(keys: DataKeys, split: str) -> tuple[ImageSource, list[str]]:
    """A split of the Hugging Face hub, or of a folder in its formats, with timm's reader."""
    options = {"input_key": keys.input_key, "target_key": keys.target_key}
    classes_by_name = _class_map(keys)
    with _explained(keys, split):
        reader = create_reader(
            keys.data, root=keys.data_dir, split=split, class_map=classes_by_name, **options
        )
    source = ReaderSource(reader)
    names = {number: name for name, number in reader.class_to_idx.items()}
    assert source.labels is not None
    count = max(names, default=int(source.labels.max(initial=-1))) + 1
    return source, _in_order(names, count)


def _streams(keys: DataKeys) -> Splits:
    """WebDataset shards or a streamed hub data set, which can only be read in order."""
    sizes = ((keys.train_split, keys.num_samples), (keys.val_split, keys.val_num_samples))
    num_classes = keys.num_classes
    kind, _, rest = keys.data.partition("/")
    is_wds = kind == "wds"
    opened = functools.partial(
        create_dataset,
        "wds/" if is_wds else keys.data,
        root=os.path.join(keys.data_dir or "", rest) if is_wds else keys.data_dir,
        batch_size=keys.batch_size,
        seed=keys.seed,
        class_map=_class_map(keys),
        input_img_mode="",  # as in the file: timm would clip 16 bits
        input_key=keys.input_key,
        target_key=keys.target_key,
        download=keys.download and not is_wds,
    )
    streams, lengths = [], []
    for (split, size), training in zip(sizes, (True, False), strict=True):
        stream = functools.partial(opened, split=split, is_training=training, num_samples=size)
        streams.append(stream)
        with _explained(keys, split):
            reader = stream().reader
        if not reader.num_samples:
            raise DataError(
                f"{keys.data}, split {split!r}: unknown length; append it to the shards as "
                f"'{split}|COUNT', or give num_samples and val_num_samples"
            )
        shards = reader.split_info.filenames if is_wds else []
        for path in (os.path.join(reader.root, name) for name in shards):
            if ":" not in path and not os.path.exists(path):
                raise DataError(f"{keys.data}, split {split!r}: there is no shard {path}")
        lengths.append(int(reader.num_samples))
    names = {number: name for name, number in (reader.class_to_idx or {}).items()}
    if not names and num_classes is None:
        raise DataError(f"{keys.data} does not state its number of classes: give --num-classes")
    count = max(names) + 1 if names else num_classes
    assert count is not None
    classes = _in_order(names, count)
    head = count if num_classes is None else num_classes
    train, validation = (
        StreamSource(stream, size, head) for stream, size in zip(streams, lengths, strict=True)
    )
    return Splits(train, validation, classes, head)


def _folder(
    keys: DataKeys, root: Path, split: str, known: Sequence[str] | None
) -> tuple[ImageSource, list[str]]:
    """``root/train/CLASS/…`` and ``root/validation/CLASS/…``, or ``train.tar`` and so on."""
    if not root.is_dir():
        raise DataError(f"no data at {root}: it must be a folder with train and validation")
    class_to_idx = _class_map(keys)
    path = _find_split(root, split)
    files = list_tar(path) if path.is_file() else _list_folder(path)
    if not files:
        raise DataError(f"no images in {path}")
    found = sorted({c for c, _ in files})
    if class_to_idx is None:
        class_to_idx = {name: i for i, name in enumerate(known or found)}
    if unknown := [c for c in found if c not in class_to_idx]:
        raise DataError(f"{path} has classes that training lacks: {', '.join(unknown[:5])}")
    labels = np.array([class_to_idx[c] for c, _ in files])
    names = {number: name for name, number in class_to_idx.items()}
    return FileSource(path, [file for _, file in files], labels), _in_order(names, max(names) + 1)


def _in_order(names: dict[int, Any], count: int) -> list[str]:
    """The names of ``count`` classes by number; those without a name are called by it."""
    return [str(names.get(number, number)) for number in range(count)]


def _find_split(root: Path, split: str) -> Path:
    names = next((names for names in _FOLDER_NAMES.values() if split in names), (split,))
    for name in dict.fromkeys((split, *names)):
        for path in (root / name, root / f"{name}.tar"):
            if path.exists():
                return path
    raise DataError(f"{root} has no split {split!r}: expected {' or '.join(names)}")


def _list_folder(root: Path) -> list[tuple[str, File]]:
    folders = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    files: list[tuple[str, File]] = []
    for folder in folders:
        images, others = list_below(folder)
        if not images:
            held = f"has no images, but {others[0]}" if others else "is empty"
            raise DataError(f"the class folder {folder} {held}")
        files += [(folder.name, (str(folder / name), 0, 0)) for name in images]
    return files


def list_tar(
    path: Path, damage: list[str] | None = None, skipped: list[str] | None = None
) -> list[tuple[str, File]]:
    """The images of an uncompressed archive, each after its class, the folder that holds it.

    ``damage`` gets a sentence where the archive breaks off; None makes an error of it. ``skipped``
    gets the names of the members that are no images, except for folders.
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


def _class_map(keys: DataKeys) -> dict[str, int] | None:
    """Class indices by name, from a text file with one name per line; None if not given.

    timm would read some files as pickles, which may execute code.
    """
    path = keys.class_map
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


def _check(splits: Splits, data: str) -> None:
    count = splits.num_classes
    if len(splits.classes) > count:
        raise DataError(
            f"{data} has {len(splits.classes)} classes, the model's head only {count}: "
            "leave num_classes out, or raise it"
        )
    for split, source in (("training", splits.train), ("validation", splits.validation)):
        if not isinstance(source, ImageSource):
            continue
        if len(source) == 0:
            raise DataError(f"{data}: the {split} split is empty")
        if source.labels is None:
            continue
        if splits.multi_label:
            if set(np.unique(source.labels)) - {0, 1}:
                raise DataError(f"{data}: the {split} split has labels other than 0 and 1")
            if split == "validation" and not np.ptp(source.labels, axis=0).any():
                raise DataError(
                    f"{data}: no class has both positive and negative validation images, so "
                    "AUC is undefined"
                )
        elif len(wrong := np.flatnonzero((source.labels < 0) | (source.labels >= count))):
            i = int(wrong[0])
            raise DataError(
                f"{data}: {source.name(i)} has label {source.labels[i]}, outside the "
                f"{count} classes 0..{count - 1}"
            )
