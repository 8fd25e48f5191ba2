"""Sources of images, divided into parts that workers read independently.

A source lists its images once, in a fixed order. A reader opens the images of a part, or a single
image by key. Each worker creates its own reader from the source's description in ``metadata.json``.
"""

from __future__ import annotations

import abc
import functools
import glob
import hashlib
import io
import itertools
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple

from PIL import Image

from backbones.common.errors import DataError, MendableError
from backbones.common.files import file_problem
from backbones.common.images import Skipped, list_below
from backbones.common.messages import first_line, one_line, shown
from backbones.data.sources import ImageSource
from backbones.data.splits import list_tar, open_split
from backbones.embedding.ownership import is_own
from backbones.embedding.table import TableError, metadata, require_pyarrow

_IN_FOLDER = ("medmnist", "torch", "torchvision")
_TRAINING = (*_IN_FOLDER, "digits", "hfds")
# How the reasons begin for which a file could not be opened; the first come from _regular.
_UNOPENED = ("OSError: it ", "DataError: it ", "PermissionError: ")


class Item(NamedTuple):
    """An image that has not been opened yet."""

    key: str
    """Unique within its source, a single line of text."""
    open: Callable[[], IO[bytes] | Image.Image]
    """Returns a file, which the caller closes, or a decoded image; OSError if it fails."""


class Reader(abc.ABC):
    """Opens images of a source; there is a subclass for each kind of source.

    Args:
        description: of the source, from ``metadata.json``: ``kind``, ``path`` and more.
        places: folders that files are read from, after resolving links; the first one is the
            source's. None for any, wherever names and links lead.
        listed: files outside of these that may be read, too.

    Attributes:
        skipped: files in the parts read so far.
    """

    def __init__(
        self,
        description: dict[str, Any],
        places: Sequence[Path] | None = None,
        listed: Collection[Path] = (),
    ) -> None:
        self.description = description
        self.root = Path(description["path"]) if places is None else places[0]
        self._places = None if places is None else [Path(os.path.realpath(p)) for p in places]
        self._listed = listed
        self.skipped = Skipped()

    def path(self, name: str) -> Path:
        """The path of one of the source's files, by its name on disk or in a key."""
        path = _on_disk(self.root, name)
        if self._places is None or path in self._listed:
            return path
        real = Path(os.path.realpath(path))
        if any(real.is_relative_to(place) for place in self._places):
            return real
        raise OutsideError(
            f"{one_line(name)} leads outside the source {self.root}, to {one_line(str(real))}, and "
            "is not read; to allow it, pass both folders to --source"
        )

    @abc.abstractmethod
    def items(self, part: Any) -> Iterator[Item]:
        """The images of one of :attr:`Source.parts`, in order.

        Raises:
            DataError: the archive or table that holds them is damaged from this point on.
        """

    @abc.abstractmethod
    def find(self, key: str) -> IO[bytes] | Image.Image:
        """The image with that key, as from :attr:`Item.open`; OSError or KeyError if none."""

    def is_back(self, key: str, reason: str) -> bool:
        """Whether an image, archive or table that could not be opened, for ``reason``, now can."""
        if not reason.startswith(_UNOPENED):
            return False
        try:
            path = self.path(key)
        except OSError:
            return False
        return file_problem(path) is None and os.access(path, os.R_OK)


class OutsideError(OSError):
    """A key leads to a file outside the source; the message says where."""


class ForeignError(MendableError, OSError):
    """The user has to say where the images of a table are; the message says how."""


@dataclass
class Source:
    """Images in a fixed order.

    Attributes:
        description: see :class:`Reader`; includes a digest of the listing.
        parts: the arguments of :meth:`Reader.items`, one for each part.
        images: number of images; None if unknown before reading.
        skipped: files in the folder.
    """

    description: dict[str, Any]
    parts: Sequence[Any]
    images: int | None
    skipped: Skipped = field(default_factory=Skipped)


def open_source(
    place: str | Path, rows: int = 1024, split: str = "train", column: str | None = None
) -> Source:
    """List the images of a source.

    Args:
        place: a folder of images, at any depth, of ``.tar`` shards or of ``.parquet`` files (not
            several of these kinds); one such file, or a pattern (``shards/*.tar``) of them; a text
            file (``.txt``) with one path per line, relative to its folder; ``digits``,
            ``medmnist/NAME``, ``torch/NAME`` or ``hfds/NAME``, as for training.
        rows: images per part; each ``.tar`` shard is a part of its own.
        split: for the last four kinds.
        column: of the images, for Parquet and ``hfds``; None for the only one there is.

    Raises:
        DataError: it can't be read, or contains no image or images of several kinds.
    """
    place = str(place)
    if place.partition("/")[0] in _TRAINING and not os.path.lexists(place):
        return _training_images(place, rows, split, column)
    path = Path(os.path.abspath(place))
    if path.is_dir():
        return _folder(path, rows, column)
    if glob.has_magic(place) and not path.exists():
        found = sorted(glob.glob(str(path)))
        if not found:
            raise DataError(f"no file matches {place}")
        for name in found:
            if (problem := file_problem(name)) is not None:
                raise DataError(f"{one_line(name)}, which matches {place}, {problem}")
        root = Path(os.path.commonpath([os.path.dirname(name) for name in found]))
        return _containers(root, [os.path.relpath(name, root) for name in found], rows, column)
    if (problem := file_problem(path)) is not None:
        raise DataError(f"the source {place} {problem}")
    if path.suffix == ".txt":
        return _list(path, rows)
    return _containers(path.parent, [path.name], rows, column)


def reader(
    description: dict[str, Any], places: Sequence[Path] | None = None, listed: Collection[Path] = ()
) -> Reader:
    """Create the :class:`Reader` for a source's description."""
    kind = description["kind"]
    if kind not in _READERS:
        raise TableError(
            f"the kind of source must be one of {', '.join(_READERS)}, not {shown(kind)}"
        )
    return _READERS[kind](description, places, listed)


def reader_of(folder: str | Path, source: Sequence[str | Path] = ()) -> Reader:
    """Create the reader for the images of a table; it reads only from the table's source.

    Args:
        source: where the source is, as for :func:`open_source`, and further folders that its keys
            and links may lead to; empty to believe the table, if it is the user's own (see
            :mod:`backbones.embedding.ownership`).

    Raises:
        ForeignError: the table is not the user's own, and ``source`` is empty, or it is another
            dataset than the table's.
    """
    content = metadata(folder)
    said = content["source"]
    is_dataset = said["kind"] == "training"
    place = said["data"] if is_dataset else said["path"]
    # The digits come with scikit-learn. Other datasets are files, or are downloaded.
    if not source and not (is_dataset and place == "digits") and not is_own(content):
        raise ForeignError(
            f"{folder} was created by another user, on another machine or by an earlier version, "
            f"so its source, {one_line(place)}, is not trusted: pass --source"
        )
    if is_dataset:
        if source and str(source[0]) != place:
            raise ForeignError(
                f"the images of {folder} are from {one_line(place)}: pass this name to --source, "
                f"not {source[0]}"
            )
        return reader({**said, "folder": _dataset_folder(place)} if source else said)
    if not source:
        root = Path(place)
        return reader(said, [root], _entries(root, said) if said["kind"] == "list" else ())
    places = [Path(os.path.abspath(named)) for named in source]
    for named in places:
        if not named.exists():
            raise ForeignError(f"--source {one_line(str(named))} does not exist")
    root = places[0] if places[0].is_dir() else places[0].parent
    return reader(said, [root, *places[1:]])


def image_bytes(folder: str | Path, key: str, source: Sequence[str | Path] = ()) -> bytes:
    """Read the file of a table's image; what is no file in the source becomes a PNG.

    Args:
        source: see :func:`reader_of`.

    Raises:
        OSError: the image can't be read, or the table may not say where it is.
    """
    images = reader_of(folder, source)
    try:
        found = images.find(key)
    except (LookupError, ValueError) as error:
        raise FileNotFoundError(f"no image {one_line(key)} in {images.root}") from error
    if isinstance(found, Image.Image):
        file = io.BytesIO()
        found.save(file, "PNG")
        return file.getvalue()
    with found:
        return found.read()


# -- files -----------------------------------------------------------------------------------------


def _folder(root: Path, rows: int, column: str | None) -> Source:
    try:
        images, others = list_below(root)
    except OSError as error:
        raise DataError(f"cannot list {error.filename or root}: {error.strerror}") from error
    kinds = {"images": images} if images else {}
    skipped = Skipped()
    for name in others:
        if (ending := _ending(name)) in _CONTAINERS:
            kinds.setdefault(f"{ending} files", []).append(name)
        else:
            skipped.add([name])
    if not kinds:
        told = f"; {skipped}" if skipped else ""
        raise DataError(f"no image, .tar or .parquet below {root}{told}")
    if len(kinds) > 1:
        told = " and ".join(f"{len(names)} {kind}" for kind, names in kinds.items())
        raise DataError(
            f"{root} contains {told}: embed each kind separately, such as archives with the "
            f"pattern '{root}/*.tar'"
        )
    ((kind, names),) = kinds.items()
    if kind == "images":
        source = _source("folder", root, names, _slices(names, rows), len(names))
    else:
        source = _containers(root, names, rows, column)
    source.skipped = skipped
    return source


def _list(path: Path, rows: int) -> Source:
    try:
        names = _names_in(path)
    except OSError as error:
        raise DataError(f"cannot read the list {path}: {error.strerror}") from error
    if not names:
        raise DataError(f"the list {path} is empty")
    if len(set(names)) < len(names):
        twice = next(name for name, count in Counter(names).items() if count > 1)
        raise DataError(f"the list {path} has {one_line(twice)} twice")
    parts = _slices(names, rows)
    return _source("list", path.parent, names, parts, len(names), list=path.name)


def _names_in(path: Path) -> list[str]:
    lines = path.read_text(encoding="utf-8-sig", errors="surrogateescape").splitlines()
    return [name for line in lines if (name := line.strip())]


def _entries(root: Path, description: dict[str, Any]) -> Collection[Path]:
    """The files that a list names, unless it has changed since it was embedded."""
    try:
        names = _names_in(root / (description.get("list") or ""))
    except OSError:
        return ()
    return {root / name for name in names} if _digest(names) == description.get("digest") else ()


class _Files(Reader):
    """Files by path: parts are tuples of names."""

    def items(self, part: Sequence[str]) -> Iterator[Item]:
        for name in part:
            yield Item(_text(name), functools.partial(self.find, name))

    def find(self, key: str) -> IO[bytes]:
        return open(_regular(self.path(key)), "rb")


def _regular(path: Path, error: type[Exception] = OSError) -> Path:
    """``path``, if opening it does not block."""
    if (problem := file_problem(path)) is not None:
        raise error(f"it {problem}")
    return path


# -- archives and tables ---------------------------------------------------------------------------


def _containers(root: Path, names: list[str], rows: int, column: str | None) -> Source:
    endings = {_ending(name): name for name in names}
    for ending, name in endings.items():
        if ending not in _CONTAINERS:
            raise DataError(
                f"{one_line(str(root / name))} is not a source of images: give a folder, .tar or "
                ".parquet files, a list of paths in a .txt, or digits, medmnist/NAME, torch/NAME, "
                "hfds/NAME"
            )
    if len(endings) > 1:
        raise DataError(f"{' and '.join(endings.values())} are of two kinds: embed each separately")
    if ".tar" in endings:
        return _source("tar", root, names, names, None)
    return _parquet(root, names, rows, column)


_CONTAINERS = (".tar", ".parquet")


def _ending(name: str) -> str:
    return os.path.splitext(name)[1].lower()


class _Archives(Reader):
    """Members of tar files: each file is a part; a key names the file and the member."""

    def items(self, part: str) -> Iterator[Item]:
        damage: list[str] = []
        skipped: list[str] = []
        found = list_tar(_regular(self.path(part), DataError), damage, skipped)
        self.skipped.add([f"{part}/{name}" for name in skipped])
        members = {name: (start, size) for _, (name, start, size) in found}
        for name, place in members.items():
            yield Item(_text(f"{part}/{name}"), functools.partial(self._open, part, *place))
        if damage:
            raise DataError(damage[0])

    def find(self, key: str) -> IO[bytes]:
        # Folders, also within the archive, may be named like archives.
        for place in (place for place, character in enumerate(key) if character == "/"):
            archive = key[:place]
            if _ending(archive) == ".tar" and self.path(archive).is_file():
                files = {_text(name): at for _, (name, *at) in list_tar(self.path(archive), [])}
                return self._open(archive, *files[key[place + 1 :]])
        raise KeyError(key)

    def _open(self, archive: str, start: int, size: int) -> IO[bytes]:
        with open(self.path(archive), "rb") as file:
            file.seek(start)
            return io.BytesIO(file.read(size))


def _parquet(root: Path, names: list[str], rows: int, column: str | None) -> Source:
    """Parts are runs of row groups with at least ``rows`` rows in total."""
    pa = require_pyarrow()
    parts: list[tuple[str, int, int, int]] = []  # file, first row, row groups from … to
    total = 0
    for name in names:
        try:
            with pa.parquet.ParquetFile(root / name) as file:
                column = _image_column(file.schema_arrow, root / name, column)
                groups = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        except (pa.ArrowException, OSError) as error:
            raise DataError(
                f"{root / name} is not a complete Parquet file: {first_line(error)}"
            ) from error
        first = begin = gathered = 0
        for number, count in enumerate(groups, start=1):
            gathered += count
            if gathered >= rows or number == len(groups):
                parts.append((name, first, begin, number))
                first, begin, gathered = first + gathered, number, 0
        total += sum(groups)
    if not total:
        raise DataError(f"the Parquet files in {root} have no rows")
    return _source("parquet", root, [*names, str(parts)], parts, total, column=column)


def _image_column(columns: Any, path: Path, wanted: str | None) -> str:
    """The column of image files: binary, or a struct with ``bytes`` as written by Hugging Face."""
    pa = require_pyarrow()

    def holds_files(kind: Any) -> bool:
        if pa.types.is_struct(kind):
            return "bytes" in {kind.field(i).name for i in range(kind.num_fields)}
        return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)

    found = [field.name for field in columns if holds_files(field.type)]
    if wanted is not None and wanted in found:
        return wanted
    if wanted is None and len(found) == 1:
        return found[0]
    told = f"it has {', '.join(found)}" if found else "it has no binary columns"
    asked = f"no column {wanted} of images" if wanted else "no single column of images"
    raise DataError(f"{path} has {asked}; {told}: choose one with --column")


class _Tables(Reader):
    """Rows of Parquet files; a key consists of the file's name and the row's number."""

    def items(self, part: tuple[str, int, int, int]) -> Iterator[Item]:
        name, row, begin, end = part
        path = _regular(self.path(name), DataError)
        pa = require_pyarrow()
        try:
            with pa.parquet.ParquetFile(path) as file:
                for data in self._rows(file, range(begin, end)):
                    yield Item(_text(f"{name}/{row}"), functools.partial(_as_file, data))
                    row += 1
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"from row {row} on: {first_line(error)}") from error

    def _rows(self, file: Any, groups: Iterable[int]) -> Iterator[bytes | None]:
        column = self.description["column"]
        for batch in file.iter_batches(batch_size=64, row_groups=list(groups), columns=[column]):
            for value in batch.column(0):
                value = value.as_py()
                yield value["bytes"] if isinstance(value, dict) else value

    def find(self, key: str) -> IO[bytes]:
        name, _, number = key.rpartition("/")
        row, pa = int(number), require_pyarrow()
        with pa.parquet.ParquetFile(_regular(self.path(name))) as file:
            for group in range(file.num_row_groups):
                count = file.metadata.row_group(group).num_rows
                if 0 <= row < count:
                    return _as_file(next(itertools.islice(self._rows(file, [group]), row, None)))
                row -= count
        raise KeyError(key)


def _as_file(data: bytes | None) -> IO[bytes]:
    if data is None:
        raise OSError("its row has no data")
    return io.BytesIO(data)


# -- training datasets -----------------------------------------------------------------------------


def _training_images(place: str, rows: int, split: str, column: str | None) -> Source:
    folder = _dataset_folder(place)
    count = len(open_split(place, split, column, folder))
    parts = [(start, min(start + rows, count)) for start in range(0, count, rows)]
    listed = [place, split, str(column), str(count)]
    facts = {"data": place, "split": split, "column": column, "folder": folder}
    return _source("training", Path(os.path.abspath(".")), listed, parts, count, **facts)


def _dataset_folder(place: str) -> str | None:
    """Training's default folder for datasets; None for Hugging Face's, which has its own cache."""
    return os.path.abspath("data") if place.partition("/")[0] in _IN_FOLDER else None


class _Training(Reader):
    """Images of a training dataset, by number."""

    @functools.cached_property
    def images(self) -> ImageSource:
        said = self.description
        return open_split(said["data"], said["split"], said.get("column"), said.get("folder"))

    def items(self, part: tuple[int, int]) -> Iterator[Item]:
        for index in range(*part):
            yield Item(_text(self.images.name(index)), functools.partial(self._load, index))

    def find(self, key: str) -> Image.Image:
        index = int(key.rpartition("[")[2].rstrip("]"))
        if not 0 <= index < len(self.images) or _text(self.images.name(index)) != key:
            raise KeyError(key)
        return self._load(index)

    def _load(self, index: int) -> Image.Image:
        return self.images.load(index)[0]


_READERS: dict[str, type[Reader]] = {
    "folder": _Files,
    "list": _Files,
    "tar": _Archives,
    "parquet": _Tables,
    "training": _Training,
}


def _source(
    kind: str,
    root: Path,
    listed: Iterable[str],
    parts: Sequence[Any],
    images: int | None,
    **more: Any,
) -> Source:
    description = {"kind": kind, "path": str(root), **more, "digest": _digest(listed)}
    return Source(description, parts, images)


def _digest(listed: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(listed).encode(errors="surrogateescape")).hexdigest()


def _slices(names: list[str], rows: int) -> list[tuple[str, ...]]:
    return [tuple(names[start : start + rows]) for start in range(0, len(names), rows)]


def _text(name: str) -> str:
    """A name as valid text for Parquet: undecodable bytes and line breaks are escaped."""
    return one_line(name.encode(errors="backslashreplace").decode(), len(name) * 8)


def _on_disk(root: Path, name: str) -> Path:
    """The path of a file below ``root`` whose name may be escaped, see :func:`_text`."""
    path = root / name
    if "\\" not in name or os.path.lexists(path):
        return path
    path = root
    for part in Path(name).parts:
        inner = path / part
        if not os.path.lexists(inner) and path.is_dir():
            inner = path / next((n for n in os.listdir(path) if _text(n) == part), part)
        path = inner
    return path
