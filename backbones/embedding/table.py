"""The format of embeddings: a folder of Parquet shards described by ``metadata.json``.

    FOLDER/metadata.json             model, weights, preprocessing, features, source, versions
    FOLDER/shards/part-00000.parquet one row for each image that could be decoded
    FOLDER/corrupt.txt               the others: key, tab, reason

Columns: ``key`` (the path relative to the source, or shard and member), ``height`` and ``width`` of
the image after its orientation is applied, ``embedding`` (a list of ``dim`` numbers; for a map, the
C·H·W values of its ``shape``) and, if requested, ``classes`` and their ``scores``, most likely
first.
Shards are written atomically, and each names the metadata that it belongs to. Their checksums are
verified as they are read (:mod:`backbones.embedding.checksum`).
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from backbones.common.checks import Check, format_problem, one_of, optional, several, text, whole
from backbones.common.dtypes import COMPUTED
from backbones.common.errors import MendableError, required
from backbones.common.files import file_problem, replacing, write_text_atomically, writing
from backbones.common.images import DECODERS
from backbones.common.messages import first_line, shown
from backbones.embedding import checksum

if TYPE_CHECKING:
    import pyarrow

METADATA, SHARDS, CORRUPT = "metadata.json", "shards", "corrupt.txt"
_SHARD_NAME = re.compile(r"part-(\d{5,18})\.parquet")
_FORMAT = 1
STORED = ("float32", "float16")  # the dtypes of embeddings
_GROUP = 1 << 25  # bytes of embeddings per row group
# Keys in a shard's metadata: the metadata.json it belongs to, and the images that could not be
# decoded.
IDENTITY_KEY, CORRUPT_KEY = b"backbones.embedding", b"backbones.corrupt"
# The smallest numbers of columns.
_LEAST = {"height": 1, "width": 1, "classes": 0}
# Fields that must be equal for two shards to belong to one table; versions and names may differ.
_DECISIVE = (
    *("model", "weights", "preprocessing", "features", "shape", "dim", "dtype"),
    *("computed", "classes", "rows", "source", "images", "shards"),
)


class TableError(MendableError, ValueError):
    """The folder is not a complete table of embeddings; the message says what is wrong."""


class DamagedShardError(TableError):
    """A shard is not a complete Parquet file with the rows that its writer put there."""

    def __init__(self, path: Path, reason: str) -> None:
        self.reason = reason
        super().__init__(
            f"{path} is damaged: {reason}; the `vision-backbones embed` command that made the "
            "table, given again, embeds this shard again"
        )


def require_pyarrow() -> Any:
    """Import ``pyarrow``, an optional dependency."""
    required("pyarrow", "the format of embeddings, Parquet,", kind=TableError)
    import pyarrow.parquet

    return pyarrow


def schema_of(content: dict[str, Any]) -> pyarrow.Schema:
    """The columns of a table with this :func:`metadata`."""
    pa = require_pyarrow()
    value = pa.float32() if content["dtype"] == "float32" else pa.float16()
    fields = [
        pa.field("key", pa.string(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("embedding", pa.list_(value, content["dim"]), nullable=False),
    ]
    if content["classes"]:
        fields += [("classes", pa.list_(pa.int32())), ("scores", pa.list_(pa.float32()))]
    return pa.schema(fields)


def metadata(folder: str | Path) -> dict[str, Any]:
    """Read ``metadata.json``, and check the type and range of its fields.

    Its fields are ``model``; ``weights`` (``file``, its name, ``path``, ``sha256``);
    ``preprocessing``; ``features``; ``shape`` and ``dim`` of an embedding; ``dtype`` of the stored
    numbers and ``computed``, the dtype of the computation; ``classes``, the number stored per
    image, and their ``names``; ``source`` (``kind``, ``path``, …); the number of ``images`` in it
    (None if unknown before reading), the number of ``shards`` and the ``rows`` per shard;
    ``decoder``, one of :data:`backbones.common.images.DECODERS`;
    ``versions``; and ``seal``, by which :mod:`backbones.embedding.ownership` knows the user's own
    tables. A missing file is a FileNotFoundError, and one that cannot be right a TableError.
    """
    path = Path(folder) / METADATA
    if path.exists() and (reason := file_problem(path)) is not None:
        raise TableError(f"{path} {reason}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{folder} contains no embeddings: there is no {METADATA} (`vision-backbones embed` "
            "writes it)"
        ) from None
    except NotADirectoryError:
        raise TableError(f"{folder} is a file; give the folder of embeddings") from None
    except (ValueError, RecursionError) as error:
        raise TableError(f"{path} is damaged: {first_line(error)}") from error
    if not isinstance(content, dict) or "format" not in content:
        raise TableError(f"{path} does not describe embeddings")
    if (problem := format_problem(content, _FORMAT)) is not None:
        raise TableError(f"{path} {problem}")
    lacking = [key for key in _DECISIVE if key not in content]
    if lacking:
        raise TableError(f"{path} lacks {', '.join(lacking)}")
    try:
        _check_fields(content)
    except (TypeError, ValueError) as error:
        raise TableError(f"{path} is damaged: {error}") from error
    return content


_MOST_DIM = 2**31 - 1  # of Arrow's lists of fixed size
_MOST = 2**63 - 1


def _check_fields(content: Mapping[str, Any]) -> None:
    """Check the fields of a ``metadata.json``; those without a rule are ignored."""
    for key, check in _RULES.items():
        within, _, name = key.rpartition(".")
        check(key, (content[within] if within else content).get(name))
    source = content["source"]
    for key in _NEEDED.get(source["kind"], ()):
        if source.get(key) is None:
            raise ValueError(f"source.{key} is missing")
    if math.prod(content["shape"]) != content["dim"]:
        raise ValueError(
            f"dim must be the product of shape, {content['shape']}, not {content['dim']}"
        )


def _text(name: str, value: Any) -> str:
    try:
        os.fsencode(text(name, value))
    except UnicodeEncodeError:
        raise ValueError(f"{name} must be a string, got {shown(value)}") from None
    return value


def _path(name: str, value: Any) -> str:
    if "\0" in _text(name, value):
        raise ValueError(f"{name} must be a path, got {shown(value)}")
    return value


def _object(name: str, value: Any) -> Any:
    if not isinstance(value, dict):
        raise TypeError(f"{name} must be an object, got {shown(value)}")
    return value


_RULES: dict[str, Check] = {
    **{"model": _text, "weights": _object, "preprocessing": _object, "features": _text},
    **{"shape": several(whole(1, _MOST_DIM)), "dim": whole(1, _MOST_DIM), "dtype": one_of(*STORED)},
    **{"computed": one_of(*COMPUTED), "classes": whole(0, _MOST_DIM), "source": _object},
    **{"images": optional(whole(0, _MOST)), "shards": whole(0, _MOST), "rows": whole(1, _MOST)},
    **{"names": optional(several(_text, may_be_empty=True)), "versions": optional(_object)},
    **{"decoder": optional(one_of(*DECODERS)), "seal": optional(_text)},
    **{"weights.file": _text, "weights.path": optional(_path), "weights.sha256": _text},
    **{"source.kind": _text, "source.path": _path, "source.list": optional(_path)},
    **{"source.column": optional(_text), "source.folder": optional(_path)},
    **dict.fromkeys(("source.digest", "source.data", "source.split"), optional(_text)),
}
# What the readers of some kinds of sources need.
_NEEDED = {"parquet": ("column",), "training": ("data", "split")}


def write_metadata(folder: Path, content: dict[str, Any]) -> None:
    """Write ``metadata.json``; :func:`metadata` lists its fields. The format version is added."""
    text = json.dumps({"format": _FORMAT, **content}, indent=1, ensure_ascii=False)
    write_text_atomically(folder / METADATA, f"{text}\n")


def identity(content: dict[str, Any]) -> str:
    """A digest of the fields that must be equal in all shards of a table."""
    decisive = {key: essence(key, content[key]) for key in _DECISIVE}
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def differences(there: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """The differences between two descriptions of a table, as "model: a there, b now"."""
    found: list[str] = []
    for key in _DECISIVE:
        old, new = essence(key, there[key]), essence(key, wanted[key])
        if old == new or (found and key in ("images", "shards")):
            continue  # the latter are derived from other fields
        if not (isinstance(old, dict) and isinstance(new, dict)):
            found.append(f"{key}: {shown(old)} there, {shown(new)} now")
            continue
        parts = [k for k in old | new if old.get(k) != new.get(k) and k != "digest"]
        found += [f"{key}: {k} {shown(old.get(k))} there, {shown(new.get(k))} now" for k in parts]
        if not parts:
            counts = [said["images"] or said["shards"] for said in (there, wanted)]
            found.append(
                f"the images listed in {old['path']} have changed ({counts[0]} there, {counts[1]} "
                "now)"
            )
    return found


def essence(key: str, value: Any) -> Any:
    """A field's value without the file names of weights and lists, which may be copies."""
    if key == "weights":
        return {"sha256": value["sha256"]}
    if key == "source":
        return {name: fact for name, fact in value.items() if name != "list"}
    return value


def shard_path(folder: str | Path, number: int) -> Path:
    """The file of shard ``number``."""
    return Path(folder) / SHARDS / f"part-{number:05}.parquet"


def shard_paths(folder: str | Path) -> list[Path]:
    """The files of a table, in order; a TableError if it is not complete."""
    shards = metadata(folder)["shards"]
    names = os.listdir(held) if (held := Path(folder) / SHARDS).is_dir() else []
    there = {int(found[1]) for name in names if (found := _SHARD_NAME.fullmatch(name))}
    if missing := shards - sum(number < shards for number in there):
        first = next(number for number in itertools.count() if number not in there)
        raise TableError(
            f"{folder} is incomplete: {missing} of {shards} shards are missing "
            f"({shard_path(folder, first).name}); wait for `vision-backbones embed`, or run the "
            "same command again to continue"
        )
    return [shard_path(folder, number) for number in range(shards)]


def batches(
    folder: str | Path, columns: Sequence[str] | None = None, rows: int = 8192
) -> Iterator[pyarrow.RecordBatch]:
    """The rows of a complete table, in order and in batches.

    Args:
        columns: which columns to read; None for all.
        rows: most rows per batch.
    """
    content, paths = metadata(folder), shard_paths(folder)
    have = schema_of(content).names
    if lacking := [name for name in columns or () if name not in have]:
        raise ValueError(f"{folder} has no column {lacking[0]}; its columns are {', '.join(have)}")
    for path in paths:
        yield from _rows(path, content, columns, rows)


def count_rows(folder: str | Path) -> int:
    """Count the rows of a complete table."""
    content, total = metadata(folder), 0
    for path in shard_paths(folder):
        with _opened(path, content) as file:
            total += file.metadata.num_rows
    return total


def keys_of(folder: str | Path) -> Iterator[str]:
    """The keys of a complete table, in order."""
    for batch in batches(folder, ["key"]):
        yield from batch.column("key").to_pylist()


def load(folder: str | Path) -> tuple[list[str], np.ndarray]:
    """The keys, and the embeddings (n, dim) in float32, of a complete table."""
    keys: list[str] = []
    vectors = np.empty((count_rows(folder), metadata(folder)["dim"]), np.float32)
    for block in blocks(folder):
        keys += block.keys.to_pylist()
        vectors[block.first : block.first + len(block.keys)] = block.vectors
    return keys, vectors


def vectors_in(batch: pyarrow.RecordBatch) -> np.ndarray:
    """The embeddings (n, dim) of a batch, in float32."""
    column = batch.column("embedding")
    vectors = column.flatten().to_numpy().reshape(-1, column.type.list_size)
    return vectors.astype(np.float32, copy=False)


def corrupt_in(path: Path, content: dict[str, Any]) -> tuple[int, list[tuple[str, str]]]:
    """A shard's number of rows, and keys and reasons of its images that could not be decoded.

    The whole shard is read, and so verified.
    """
    with _opened(path, content) as file:
        try:
            noted = json.loads(file.metadata.metadata[CORRUPT_KEY])
            corrupt = [(key, reason) for key, reason in noted]
            if not all(isinstance(text, str) for entry in corrupt for text in entry):
                raise TypeError(shown(noted))
        except (LookupError, TypeError, ValueError, RecursionError) as error:
            raise DamagedShardError(path, "it has no list of corrupt images") from error
        count = file.metadata.num_rows
    if sum(map(len, _rows(path, content, rows=256))) != count:
        raise DamagedShardError(path, f"it does not have the {count} rows that it declares")
    return count, corrupt


def _rows(
    path: Path, content: dict[str, Any], columns: Sequence[str] | None = None, rows: int = 8192
) -> Iterator[pyarrow.RecordBatch]:
    """The verified rows of a shard."""
    with _opened(path, content) as file:
        for batch in file.iter_batches(batch_size=rows, columns=columns):
            batch.validate(full=True)
            if (wrong := _wrong(batch)) is not None:
                raise DamagedShardError(path, wrong)
            yield batch


@contextmanager
def _opened(path: Path, content: dict[str, Any]) -> Iterator[Any]:
    """Open a shard after verifying its checksum, its table and its columns."""
    pa = require_pyarrow()
    try:
        if (reason := checksum.flaw(path)) is not None:
            raise DamagedShardError(path, reason)
        with pa.parquet.ParquetFile(path) as file:
            found = file.schema_arrow
            if (found.metadata or {}).get(IDENTITY_KEY) != identity(content).encode():
                raise TableError(
                    f"{path} belongs to other embeddings (another model, weights, preprocessing or "
                    f"source) than the {METADATA} beside it"
                )
            if not found.equals(schema_of(content)):
                raise DamagedShardError(path, f"its columns differ from those in {METADATA}")
            # Keys differ, so each takes some bits.
            if not 0 <= file.metadata.num_rows <= 8 * os.path.getsize(path):
                raise DamagedShardError(path, f"it claims to have {file.metadata.num_rows} rows")
            yield file
    except pa.ArrowMemoryError:
        raise  # which says nothing about the file
    except (pa.ArrowException, OSError) as error:
        raise DamagedShardError(path, first_line(error)) from error


def _wrong(batch: pyarrow.RecordBatch) -> str | None:
    """Why these cannot be rows of a shard; None if they can."""
    import pyarrow.compute

    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        values = column.flatten() if hasattr(column, "flatten") else column
        if column.null_count or values.null_count:
            return f"it has rows without {name}"
        least = _LEAST.get(name)
        if least is not None and len(values) and pyarrow.compute.min(values).as_py() < least:
            return f"{name} must be at least {least}"
    return None


# -- writing ---------------------------------------------------------------------------------------


class Shard:
    """The rows of a shard that is being written, see :func:`writing_shard`."""

    def __init__(self, path: Path, schema: pyarrow.Schema, writer: Any) -> None:
        self._path, self._schema, self._writer = path, schema, writer
        self.rows = 0  # added so far
        # Keys and reasons of images that could not be decoded, for the caller to fill.
        self.corrupt: list[tuple[str, str]] = []
        self._added: list[pyarrow.RecordBatch] = []
        self._bytes = 0

    def add(
        self,
        keys: Sequence[str],
        sizes: Sequence[tuple[int, int]],
        embeddings: np.ndarray,
        classes: np.ndarray | None = None,
        scores: np.ndarray | None = None,
    ) -> None:
        """Add n rows: keys, heights and widths, (n, dim) and, if the schema has them, (n, k)."""
        pa, kind = require_pyarrow(), self._schema.field("embedding").type
        flat = embeddings.astype(kind.value_type.to_pandas_dtype(), copy=False).reshape(-1)
        columns: dict[str, Any] = {
            "key": keys,
            "height": [height for height, _ in sizes],
            "width": [width for _, width in sizes],
            "embedding": pa.FixedSizeListArray.from_arrays(pa.array(flat), type=kind),
        }
        if classes is not None and scores is not None:
            columns |= {"classes": classes.tolist(), "scores": scores.tolist()}
        self._added.append(pa.RecordBatch.from_pydict(columns, schema=self._schema))
        self.rows += len(keys)
        self._bytes += flat.nbytes
        if self._bytes >= _GROUP:
            self.flush()

    def flush(self) -> None:
        """Write the rows added since the last call."""
        if self._added:
            with writing(self._path):
                self._writer.write_table(require_pyarrow().Table.from_batches(self._added))
        self._added, self._bytes = [], 0


@contextmanager
def writing_shard(path: Path, content: dict[str, Any]) -> Iterator[Shard]:
    """Write a shard atomically; if the block raises, the partial file is removed.

    Two writers of the same shard, such as a process presumed dead and its replacement, do not
    interfere.
    """
    schema = schema_of(content).with_metadata({IDENTITY_KEY: identity(content).encode()})
    with ExitStack() as stack:
        with writing(path):
            temporary = stack.enter_context(replacing(path, unique=True))
            file = open(temporary, "w+b")  # noqa: SIM115
            stack.callback(_close, file)
            # Embeddings do not compress, so they are stored uncompressed for fast reading.
            writer = require_pyarrow().parquet.ParquetWriter(
                file, schema, compression="none", use_dictionary=False
            )
            stack.callback(_close, writer)
        shard = Shard(path, schema, writer)
        yield shard
        shard.flush()
        noted = {
            CORRUPT_KEY: json.dumps(shard.corrupt),
            checksum.CHECKSUM_KEY: checksum.PLACEHOLDER,
        }
        with writing(path):
            writer.add_key_value_metadata(noted)
            writer.close()
            checksum.sign(file)
            file.close()
            stack.close()


def _close(file: Any) -> None:
    with suppress(OSError):  # of buffered data that cannot be written
        file.close()


# -- rows ------------------------------------------------------------------------------------------


@dataclass
class Block:
    """Consecutive rows, of which the first has the number ``first``."""

    first: int
    keys: pyarrow.Array
    vectors: np.ndarray  # (n, dim), float32


def unit(vectors: np.ndarray) -> np.ndarray:
    """Scale vectors (n, dim) to unit length, in float32; those zero or not finite become 0."""
    with np.errstate(over="ignore", invalid="ignore"):
        vectors = vectors.astype(np.float32)
        # Scale by the maximum first: squares of large numbers would overflow.
        largest = np.abs(vectors).max(axis=1, initial=0, keepdims=True)
        usable = np.isfinite(largest) & (largest > 0)
        vectors = np.where(usable, vectors / np.where(usable, largest, 1), 0)
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(length > 0, length, 1)


def blocks(folder: str | Path) -> Iterator[Block]:
    """All rows of a table, in order and in blocks, with the embeddings as stored."""
    first = 0
    for batch in batches(folder, ["key", "embedding"]):
        yield Block(first, batch.column("key"), vectors_in(batch))
        first += len(batch)


def selected(
    folder: str | Path, numbers: Collection[int], columns: Sequence[str]
) -> Iterator[pyarrow.RecordBatch]:
    """Some columns of the rows with the given numbers, in order and in batches."""
    wanted, first = np.unique(np.fromiter(numbers, np.int64)), 0
    for batch in batches(folder, columns):
        low, high = np.searchsorted(wanted, (first, first + len(batch)))
        if low < high:
            yield batch.take(require_pyarrow().array(wanted[low:high] - first))
        first += len(batch)


def by_number(
    folder: str | Path, numbers: Collection[int], columns: Sequence[str]
) -> dict[int, dict[str, Any]]:
    """Read some columns of the rows with the given numbers."""
    rows = (row for batch in selected(folder, numbers, columns) for row in batch.to_pylist())
    return dict(zip(sorted({*numbers}), rows, strict=True))


def vectors_of(folder: str | Path, keys: Sequence[str]) -> tuple[list[int], np.ndarray]:
    """Row numbers and embeddings (n, dim) of n keys of the table."""
    import pyarrow.compute

    wanted = pyarrow.array(keys, pyarrow.string())
    found: dict[str, tuple[int, np.ndarray]] = {}
    example = ""
    for block in blocks(folder):
        example = example or block.keys[0].as_py()
        for place in np.flatnonzero(pyarrow.compute.is_in(block.keys, wanted)).tolist():
            found[block.keys[place].as_py()] = block.first + place, block.vectors[place]
    missing = [key for key in keys if key not in found]
    if missing:
        others = f"; its keys look like {shown(example)}" if example else ""
        raise ValueError(f"{folder} has no image with the key {shown(missing[0])}{others}")
    vectors = np.stack([found[key][1] for key in keys])
    if len(unusable := np.flatnonzero(~np.isfinite(vectors).all(axis=1))):
        key = shown(keys[unusable[0]])
        raise ValueError(
            f"the embedding of {key} in {folder} is not finite, so nothing is similar to it"
        )
    return [found[key][0] for key in keys], vectors
