"""Small tables of given embeddings for the tests, made without a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet

from backbones.embedding.table import (
    CORRUPT_KEY,
    IDENTITY_KEY,
    shard_path,
    write_metadata,
    writing_shard,
)


def make_table(
    folder: Path,
    vectors: np.ndarray,
    keys: Sequence[str] | None = None,
    sizes: Sequence[tuple[int, int]] | None = None,
    rows: int = 50,
    dtype: str = "float32",
    **facts: Any,
) -> Path:
    """Write a complete table with shards of ``rows`` rows; ``facts`` go into its metadata."""
    keys = [f"{number:05}.png" for number in range(len(vectors))] if keys is None else keys
    sizes = [(40, 36)] * len(vectors) if sizes is None else sizes
    dim = vectors.shape[1]
    starts = range(0, len(vectors), rows)
    content = {
        **{"model": "shvit_s1", "weights": {"file": "x.pth", "path": "x.pth", "sha256": "0" * 64}},
        **{"preprocessing": {}, "features": "pre_logits", "shape": [dim], "dim": dim},
        **{"dtype": dtype, "computed": "float32", "classes": 0, "names": []},
        **{"source": {"kind": "folder", "path": str(folder)}, "images": len(vectors)},
        **{"shards": len(starts), "rows": rows, "versions": {}, "format": 1, **facts},
    }
    (folder / "shards").mkdir(parents=True)
    write_metadata(folder, content)
    for number, start in enumerate(starts):
        part = slice(start, start + rows)
        with writing_shard(shard_path(folder, number), content) as writer:
            writer.add(keys[part], sizes[part], vectors[part])
    return folder


def rewrite(path: Path, column: Any = None, name: str = "embedding", **facts: str) -> None:
    """Write a shard as an earlier version did, without a checksum.

    Args:
        column: to put in for the one of that name.
        facts: of the file's metadata, to put in.
    """
    with pyarrow.parquet.ParquetFile(path) as file:
        whole, kept = file.read(), file.metadata.metadata
    if column is not None:
        field = pyarrow.field(name, column.type, nullable=bool(column.null_count))
        whole = whole.set_column(whole.schema.get_field_index(name), field, column)
    kept = {key: kept[key] for key in (IDENTITY_KEY, CORRUPT_KEY)}
    kept |= {f"backbones.{key}".encode(): value.encode() for key, value in facts.items()}
    pyarrow.parquet.write_table(whole.replace_schema_metadata(kept), path, compression="none")
