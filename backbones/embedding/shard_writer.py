"""Shards of a table of embeddings, written atomically."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from backbones.common.files import replacing, writing
from backbones.embedding.checksum import CHECKSUM_KEY, PLACEHOLDER, sign
from backbones.embedding.table import CORRUPT_KEY, IDENTITY_KEY, require_pyarrow

if TYPE_CHECKING:
    import pyarrow

_GROUP = 1 << 25  # bytes of embeddings per row group


class Shard:
    """The rows of a shard that is being written, see :func:`writing_shard`.

    Attributes:
        rows: number of rows added so far.
        corrupt: keys and reasons of images that could not be decoded, for the caller to fill.
    """

    def __init__(self, path: Path, schema: pyarrow.Schema, writer: Any) -> None:
        self._path, self._schema, self._writer = path, schema, writer
        self.rows, self.corrupt = 0, list[tuple[str, str]]()
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
        """Add n rows.

        Args:
            sizes: height and width of each image.
            embeddings: (n, dim).
            classes, scores: (n, k), if the schema has them.
        """
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
def writing_shard(path: Path, schema: pyarrow.Schema, identity: str) -> Iterator[Shard]:
    """Write a shard atomically; if the block raises, the partial file is removed.

    Two writers of the same shard, such as a process presumed dead and its replacement, do not
    interfere.

    Args:
        schema, identity: from the functions of these names in :mod:`backbones.embedding.table`.
    """
    schema = schema.with_metadata({IDENTITY_KEY: identity.encode()})
    with ExitStack() as stack:
        with writing(path):
            temporary = stack.enter_context(replacing(path, unique=True))
            file = stack.enter_context(_closing(open(temporary, "w+b")))  # noqa: SIM115
            # Embeddings do not compress, so they are stored uncompressed for fast reading.
            writer = require_pyarrow().parquet.ParquetWriter(
                file, schema, compression="none", use_dictionary=False
            )
            stack.enter_context(_closing(writer))
        shard = Shard(path, schema, writer)
        yield shard
        shard.flush()
        noted = {CORRUPT_KEY: json.dumps(shard.corrupt), CHECKSUM_KEY: PLACEHOLDER}
        with writing(path):
            writer.add_key_value_metadata(noted)
            writer.close()
            sign(file)
            file.close()
            stack.close()


@contextmanager
def _closing(file: Any) -> Iterator[Any]:
    """Close a file; buffered data that cannot be written is discarded."""
    try:
        yield file
    finally:
        with suppress(OSError):
            file.close()
