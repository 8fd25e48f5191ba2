"""The format of embeddings: a folder of Parquet shards described by ``metadata.json``.

    FOLDER/metadata.json             model, weights, preprocessing, features, source, versions
    FOLDER/shards/part-00000.parquet one row for each image that could be decoded
    FOLDER/corrupt.txt               the others: key, tab, reason

Columns: ``key`` (the path relative to the source, or shard and member), ``height`` and ``width`` of
the image after its orientation is applied, ``embedding`` (a list of ``dim`` numbers; for a map, the
C·H·W values of its ``shape``) and, if requested, ``classes`` and their ``scores``, most likely
first.
Shards are written atomically (:mod:`backbones.embedding.shard_writer`), and each names the metadata
that it belongs to.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from backbones.core.console import MendableError
from backbones.core.messages import first_line, shown
from backbones.training.checkpoint import write_atomically

if TYPE_CHECKING:
    import pyarrow

__all__ = [
    "CORRUPT",
    "CORRUPT_KEY",
    "IDENTITY_KEY",
    "METADATA",
    "SHARDS",
    "DamagedShardError",
    "TableError",
    "batches",
    "corrupt_in",
    "differences",
    "identity",
    "load",
    "metadata",
    "require_pyarrow",
    "schema",
    "shard_path",
    "shard_paths",
    "write_corrupt",
    "write_metadata",
]

METADATA, SHARDS, CORRUPT = "metadata.json", "shards", "corrupt.txt"
_FORMAT = 1
# Keys in a shard's metadata: the metadata.json it belongs to, and the images that could not be
# decoded.
IDENTITY_KEY, CORRUPT_KEY = b"backbones.embedding", b"backbones.corrupt"
# Fields that must be equal for two shards to belong to one table; versions and names may differ.
_DECISIVE = (
    *("format", "model", "weights", "preprocessing", "features", "shape", "dim", "dtype"),
    *("computed", "classes", "rows", "source", "images", "shards"),
)
_DTYPES = ("float32", "float16")


class TableError(MendableError, ValueError):
    """The folder is not a complete table of embeddings; the message says what is wrong."""


class DamagedShardError(TableError):
    """A shard is not a complete Parquet file."""


def require_pyarrow() -> Any:
    """Import ``pyarrow``, an optional dependency.

    Raises:
        TableError: it is not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise TableError("embeddings are kept in Parquet: pip install pyarrow") from None
    return pyarrow


def schema(dim: int, dtype: str = "float32", classes: bool = False) -> pyarrow.Schema:
    """The columns of a table.

    Args:
        dim: length of an embedding.
        dtype: ``"float32"`` or ``"float16"``.
        classes: include the columns ``classes`` and ``scores``.

    Raises:
        ValueError: another ``dtype``, or ``dim`` below 1.
    """
    pa = require_pyarrow()
    if dtype not in _DTYPES:
        raise ValueError(f"dtype must be {' or '.join(_DTYPES)}, got {dtype!r}")
    if dim < 1:
        raise ValueError(f"dim must be at least 1, got {dim}")
    value = pa.float32() if dtype == "float32" else pa.float16()
    fields = [
        pa.field("key", pa.string(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("embedding", pa.list_(value, dim), nullable=False),
    ]
    if classes:
        fields += [("classes", pa.list_(pa.int32())), ("scores", pa.list_(pa.float32()))]
    return pa.schema(fields)


def metadata(folder: str | Path) -> dict[str, Any]:
    """Read ``metadata.json``.

    Its fields are ``model``; ``weights`` (``file``, its name, ``path``, ``sha256``);
    ``preprocessing``; ``features``; ``shape`` and ``dim`` of an embedding; ``dtype`` of the stored
    numbers and ``computed``, the dtype of the computation; ``classes``, the number stored per
    image, and their ``names``; ``source`` (``kind``, ``path``, …); the number of ``images`` in it
    (None if unknown before reading), the number of ``shards`` and the ``rows`` per shard;
    ``decoder``, one of :data:`backbones.core.images.DECODERS` ("pillow" if missing); ``versions``.

    Raises:
        FileNotFoundError: the folder does not exist or has no ``metadata.json``.
        TableError: the file is damaged or has another format.
    """
    path = Path(folder) / METADATA
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{folder} holds no embeddings: there is no {METADATA} (`vision-backbones embed` "
            "writes it)"
        ) from None
    except NotADirectoryError:
        raise TableError(f"{folder} is a file; give the folder of embeddings") from None
    except (ValueError, RecursionError) as error:
        raise TableError(f"{path} is damaged: {first_line(error)}") from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise TableError(f"{path} does not describe embeddings (format {_FORMAT})")
    lacking = [key for key in _DECISIVE if key not in content]
    if lacking:
        raise TableError(f"{path} lacks {', '.join(lacking)}")
    return content


def write_metadata(folder: Path, content: dict[str, Any]) -> None:
    """Write ``metadata.json``; :func:`metadata` lists its fields. The format version is added.

    Raises:
        CheckpointFileError: it cannot be written.
    """
    text = json.dumps({"format": _FORMAT, **content}, indent=1, ensure_ascii=False)
    data = text.encode(errors="backslashreplace") + b"\n"
    write_atomically(folder / METADATA, lambda file: file.write(data))


def identity(content: dict[str, Any]) -> str:
    """A digest of the fields that must be equal in all shards of a table."""
    decisive = {key: _essence(key, content[key]) for key in _DECISIVE if key != "format"}
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def differences(there: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """The differences between two descriptions of a table, as "model: a there, b now"."""
    found: list[str] = []
    for key in _DECISIVE:
        if key == "format" or (key in ("images", "shards") and found):
            continue  # derived from other fields
        old, new = _essence(key, there[key]), _essence(key, wanted[key])
        if isinstance(old, dict) and isinstance(new, dict):
            parts = [k for k in {**old, **new} if old.get(k) != new.get(k)]
            if parts == ["digest"]:
                found.append(
                    f"the images listed in {old['path']} have changed "
                    f"({there['images'] or there['shards']} there, "
                    f"{wanted['images'] or wanted['shards']} now)"
                )
                continue
            parts = [k for k in parts if k != "digest"]
            found += [
                f"{key}: {k} {shown(old.get(k))} there, {shown(new.get(k))} now" for k in parts
            ]
        elif old != new:
            found.append(f"{key}: {shown(old)} there, {shown(new)} now")
    return found


def _essence(key: str, value: Any) -> Any:
    """A field's value without the name of the weights' file, which may be a copy."""
    return {"sha256": value["sha256"]} if key == "weights" else value


def shard_path(folder: str | Path, number: int) -> Path:
    """The file of shard ``number``."""
    return Path(folder) / SHARDS / f"part-{number:05}.parquet"


def shard_paths(folder: str | Path) -> list[Path]:
    """The files of a complete table, in order.

    Raises:
        FileNotFoundError, TableError: see :func:`metadata`; or shards are missing.
    """
    content = metadata(folder)
    paths = [shard_path(folder, number) for number in range(content["shards"])]
    there = set(os.listdir(Path(folder) / SHARDS)) if (Path(folder) / SHARDS).is_dir() else set()
    missing = [path.name for path in paths if path.name not in there]
    if missing:
        raise TableError(
            f"{folder} is incomplete: {len(missing)} of {len(paths)} shards are not there yet "
            f"({missing[0]}); `vision-backbones embed` is still running, or the same command "
            "again goes on"
        )
    return paths


def batches(
    folder: str | Path, columns: Sequence[str] | None = None, rows: int = 8192
) -> Iterator[pyarrow.RecordBatch]:
    """The rows of a complete table, in order and in batches.

    Args:
        columns: which columns to read; None for all.
        rows: most rows per batch.

    Raises:
        FileNotFoundError, TableError: see :func:`shard_paths`; or a shard is damaged or belongs to
            another table.
        ValueError: the table lacks a column.
    """
    pa = require_pyarrow()
    content = metadata(folder)
    paths = shard_paths(folder)
    expected = schema(content["dim"], content["dtype"], bool(content["classes"]))
    lacking = [name for name in columns or () if name not in expected.names]
    if lacking:
        raise ValueError(f"{folder} has no column {lacking[0]}, but {', '.join(expected.names)}")
    for path in paths:
        try:
            with pa.parquet.ParquetFile(path) as file:
                _check(path, file.schema_arrow, expected, identity(content))
                yield from file.iter_batches(batch_size=rows, columns=columns)
        except (pa.ArrowException, OSError) as error:
            raise DamagedShardError(f"{path} is damaged: {first_line(error)}") from error


def load(folder: str | Path) -> tuple[list[str], np.ndarray]:
    """The keys, and the embeddings (n, dim) in float32, of a complete table.

    Raises:
        FileNotFoundError, TableError: see :func:`batches`.
    """
    keys = [key for batch in batches(folder, ["key"]) for key in batch.column("key").to_pylist()]
    vectors = np.empty((len(keys), metadata(folder)["dim"]), np.float32)
    row = 0
    for batch in batches(folder, ["embedding"]):
        values = batch.column("embedding").flatten().to_numpy()
        vectors[row : row + len(batch)] = values.reshape(len(batch), -1)
        row += len(batch)
    return keys, vectors


def corrupt_in(path: Path, expected: str) -> tuple[int, list[tuple[str, str]]]:
    """A shard's number of rows, and keys and reasons of its images that could not be decoded.

    Args:
        expected: the :func:`identity` that the shard must have.

    Raises:
        DamagedShardError: the shard is damaged.
        TableError: the shard belongs to another table.
    """
    pa = require_pyarrow()
    try:
        with pa.parquet.ParquetFile(path) as file:
            _check(path, file.schema_arrow, None, expected)
            noted = json.loads(file.metadata.metadata[CORRUPT_KEY])
            return file.metadata.num_rows, [(key, reason) for key, reason in noted]
    except (pa.ArrowException, OSError, LookupError, json.JSONDecodeError) as error:
        raise DamagedShardError(f"{path} is damaged: {first_line(error)}") from error


def write_corrupt(folder: Path, corrupt: Sequence[tuple[str, str]]) -> None:
    """Write ``corrupt.txt``: key, tab and reason of each image that could not be decoded.

    Raises:
        CheckpointFileError: it cannot be written.
    """
    text = "".join(f"{key}\t{reason}\n" for key, reason in corrupt)
    write_atomically(folder / CORRUPT, lambda file: file.write(text.encode()))


def _check(path: Path, found: Any, expected: Any, of: str) -> None:
    if (found.metadata or {}).get(IDENTITY_KEY) != of.encode():
        raise TableError(
            f"{path} belongs to other embeddings (another model, weights, preprocessing or "
            f"source) than the {METADATA} beside it"
        )
    if expected is not None and not found.equals(expected):
        raise TableError(f"{path} has other columns than {METADATA} says: {found.names}")
