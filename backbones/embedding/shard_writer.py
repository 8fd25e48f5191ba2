"""Shards of a table of embeddings, written atomically."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from backbones.common.files import replacing, writing
from backbones.embedding.checksum import CHECKSUM_KEY, PLACEHOLDER, sign
from backbones.embedding.table import CORRUPT_KEY, IDENTITY_KEY, require_pyarrow

if TYPE_CHECKING:
    import pyarrow

_GROUP = 1 << 25  # bytes of embeddings per row group


class ShardWriter:
    """Writes one shard atomically.

    If the ``with`` block raises, the partial file is removed. Two writers of the same shard, such
    as a process presumed dead and its replacement, do not interfere.

    Args:
        path: of the shard; its folder must exist.
        schema: from :func:`backbones.embedding.table.schema`.
        identity: from :func:`backbones.embedding.table.identity`.

    Attributes:
        rows: added so far.
        corrupt: keys and reasons of images that could not be decoded, for the caller to fill.
    """

    def __init__(self, path: Path, schema: pyarrow.Schema, identity: str) -> None:
        self._pa = require_pyarrow()
        self.path, self.schema = path, schema.with_metadata({IDENTITY_KEY: identity.encode()})
        self.rows, self.corrupt = 0, list[tuple[str, str]]()
        self._added: list[pyarrow.RecordBatch] = []
        self._bytes = 0
        self._writer: Any = None

    def add(
        self,
        keys: Sequence[str],
        sizes: Sequence[tuple[int, int]],
        embeddings: np.ndarray,
        classes: np.ndarray | None = None,
        scores: np.ndarray | None = None,
    ) -> None:
        """Add rows.

        Args:
            keys: of n images.
            sizes: height and width of each.
            embeddings: (n, dim).
            classes, scores: (n, k), if the schema has them.
        """
        kind = self.schema.field("embedding").type
        flat = embeddings.astype(kind.value_type.to_pandas_dtype(), copy=False).reshape(-1)
        columns: dict[str, Any] = {
            "key": keys,
            "height": [height for height, _ in sizes],
            "width": [width for _, width in sizes],
            "embedding": self._pa.FixedSizeListArray.from_arrays(self._pa.array(flat), type=kind),
        }
        if classes is not None and scores is not None:
            columns |= {"classes": classes.tolist(), "scores": scores.tolist()}
        self._added.append(self._pa.RecordBatch.from_pydict(columns, schema=self.schema))
        self.rows += len(keys)
        self._bytes += flat.nbytes
        if self._bytes >= _GROUP:
            self._flush()

    def _flush(self) -> None:
        with writing(self.path):
            if self._bytes:
                self._writer.write_table(self._pa.Table.from_batches(self._added))
        self._added, self._bytes = [], 0

    def __enter__(self) -> ShardWriter:
        with writing(self.path), ExitStack() as stack:
            temporary = stack.enter_context(replacing(self.path, unique=True))
            self._file = open(temporary, "w+b")  # noqa: SIM115 - closed when the block ends
            stack.callback(self._leave)
            # Embeddings do not compress, so they are stored uncompressed for fast reading.
            self._writer = self._pa.parquet.ParquetWriter(
                self._file, self.schema, compression="none", use_dictionary=False
            )
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            self._stack.__exit__(kind, error, trace)
            return
        with writing(self.path), self._stack:
            self._flush()
            self._writer.add_key_value_metadata(
                {CORRUPT_KEY: json.dumps(self.corrupt), CHECKSUM_KEY: PLACEHOLDER}
            )
            self._writer.close()
            sign(self._file)
            self._file.close()

    def _leave(self) -> None:
        """Close the files; buffered data that cannot be written is discarded."""
        for file in (self._writer, self._file):
            with suppress(OSError):
                if file is not None:
                    file.close()
