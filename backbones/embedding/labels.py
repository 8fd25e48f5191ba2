"""The class of each image of a table: from a file, the name of its folder or its source."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from backbones.common.errors import MendableError
from backbones.common.messages import first_line, one_line, shown
from backbones.embedding.sources import reader_of
from backbones.embedding.table import keys_of, metadata

__all__ = ["LabelError", "labels_of", "read_assignments", "split_of"]

_KEY_NAMES = ("key", "image", "file", "filename", "file_name", "path", "name")
_LABEL_NAMES = ("label", "class", "split")
_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("test", "val", "valid", "validation"), "test"),
}


class LabelError(MendableError, ValueError):
    """The labels cannot be read or match no image; the message says why."""


def labels_of(
    folder: str | Path, labels: Mapping[str, str] | str | Path, source: Sequence[str | Path] = ()
) -> list[str | None]:
    """The class of each row of a table, in order; None if unlabelled.

    Args:
        labels: classes by key; a file of them, see :func:`read_assignments`; ``"folder"`` for the
            name of the folder that contains the image; ``"source"`` for the labels of the dataset
            that was embedded (``digits``, ``medmnist/…``, ``torch/…``, ``hfds/…``).
        source: see :func:`backbones.embedding.sources.reader_of`; for ``"source"``.
    """
    keys = list(keys_of(folder))
    if labels == "folder":
        found = [key.split("/")[-2] if "/" in key else None for key in keys]
    elif isinstance(labels, Mapping):
        found = [labels.get(key) for key in keys]
    else:
        is_source = labels == "source"
        known = _of_source(folder, source) if is_source else read_assignments(Path(labels))
        found = [known.get(key) for key in keys]
    if keys and not any(label is not None for label in found):
        if labels == "folder":
            problem = f"no image of {folder} is in a class folder: its"
        else:
            told = "" if isinstance(labels, Mapping) else f"{labels}: "
            problem = f"{told}none of its keys is in {folder}, whose"
        raise LabelError(f"{problem} keys look like {shown(keys[0])}")
    return found


def split_of(folder: str | Path, split: Mapping[str, str] | str | Path) -> list[str | None]:
    """``"train"``, ``"test"`` or None (neither) for each row of a table, in order.

    Args:
        split: like ``labels`` of :func:`labels_of`, with the values train and test (or val, valid,
            validation); ``"folder"`` for the first of these words in the image's path.
    """
    if split == "folder":
        found = [
            next((_SPLITS[part] for part in key.split("/")[:-1] if part in _SPLITS), None)
            for key in keys_of(folder)
        ]
        if not any(found):
            raise LabelError(f"no image of {folder} is in a folder named train, test or val")
        return found
    words = labels_of(folder, split)
    for word in words:
        if word is not None and word not in _SPLITS:
            raise LabelError(f"{split}: a split is {', '.join(_SPLITS)}, not {shown(word)}")
    return [None if word is None else _SPLITS[word] for word in words]


def read_assignments(path: Path) -> dict[str, str]:
    """Read labels by key: CSV or TSV with a key and a label per row, or JSON.

    A header row (``key,label``) is optional; with one, further columns are allowed and ignored.
    JSON is an object of labels by key, or a list of pairs or of objects with ``key`` and ``label``.
    """
    try:
        text = path.read_text(encoding="utf-8-sig", errors="backslashreplace")
    except OSError as error:
        raise LabelError(f"cannot read {path}: {error.strerror}") from error
    pairs = _in_json(path, text) if path.suffix == ".json" else _in_columns(path, text)
    found: dict[str, str] = {}
    for key, label in pairs:
        if found.setdefault(key, label) != label:
            raise LabelError(
                f"{path} gives {shown(key)} two labels, {shown(found[key])} and {shown(label)}"
            )
    if not found:
        raise LabelError(f"{path} has no labels")
    return found


def _of_source(folder: str | Path, source: Sequence[str | Path]) -> dict[str, str]:
    """Labels by key, if the images are of a dataset that training supports."""
    said = metadata(folder)["source"]
    if said["kind"] != "training":
        raise LabelError(
            f"the images of {folder} come from a {said['kind']}, which has no classes: give a "
            "file of labels, or folder"
        )
    images: Any = reader_of(folder, source)
    numbers = images.images.labels
    if numbers is None or numbers.ndim != 1:
        raise LabelError(f"{said['data']} does not give one class for each image")
    items = images.items((0, len(numbers)))
    return {item.key: str(int(n)) for item, n in zip(items, numbers, strict=True)}


def _in_columns(path: Path, text: str) -> Iterator[tuple[str, str]]:
    head = text.partition("\n")[0]
    separator = "\t" if "\t" in head else ","
    try:
        rows = [row for row in csv.reader(io.StringIO(text), delimiter=separator) if row]
    except csv.Error as error:
        raise LabelError(f"{path} is not a table: {first_line(error)}") from error
    if not rows:
        return
    key, label = 0, 1
    names = [cell.strip().lower() for cell in rows[0]]
    named = [i for i, name in enumerate(names) if name in _LABEL_NAMES]
    keys = [i for i, name in enumerate(names) if name in _KEY_NAMES]
    if keys and (named or keys[0] == 0):
        key, label = keys[0], named[0] if named else 1
        rows = rows[1:]
    for row in rows:
        if len(row) <= max(key, label):
            raise LabelError(
                f"{path}: a row must be a key and a label, separated by a comma or a tab, not "
                f"{shown(separator.join(row))}"
            )
        yield row[key].strip(), one_line(row[label].strip())


def _in_json(path: Path, text: str) -> Iterator[tuple[str, str]]:
    try:
        content = json.loads(text)
        entries = content.items() if isinstance(content, dict) else content
        for entry in entries:
            key, label = (entry["key"], entry["label"]) if isinstance(entry, dict) else tuple(entry)
            if not isinstance(key, str) or not isinstance(label, (str, int)):
                raise TypeError(entry)
            yield key, one_line(str(label))
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise LabelError(
            f"{path} must be JSON with labels by key, or a list of key-label pairs"
        ) from error
