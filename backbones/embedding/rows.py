"""Read rows of a table of embeddings: block by block, by number or by key."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from backbones.common.messages import shown
from backbones.embedding.table import batches, metadata, require_pyarrow

if TYPE_CHECKING:
    import pyarrow


@dataclass
class Block:
    """Consecutive rows.

    Attributes:
        first: number of the first row, counted from 0.
        keys: of the n images.
        vectors: (n, dim), float32.
    """

    first: int
    keys: pyarrow.Array
    vectors: np.ndarray


def unit(vectors: np.ndarray) -> np.ndarray:
    """Scale rows to unit length, so that dot products are cosines.

    Rows that are zero or not finite become 0.

    Args:
        vectors: (n, dim).

    Returns:
        (n, dim), float32.
    """
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
    dim, first = metadata(folder)["dim"], 0
    for batch in batches(folder, ["key", "embedding"]):
        yield Block(first, batch.column("key"), _array(batch, dim))
        first += len(batch)


def by_number(
    folder: str | Path, numbers: Collection[int], columns: Sequence[str]
) -> dict[int, dict[str, Any]]:
    """Read some columns of the rows with the given numbers."""
    wanted = np.unique(np.fromiter(numbers, np.int64))
    found: dict[int, dict[str, Any]] = {}
    first = 0
    for batch in batches(folder, columns):
        low, high = np.searchsorted(wanted, (first, first + len(batch)))
        if low < high:
            inside = wanted[low:high]
            entries = batch.take(require_pyarrow().array(inside - first)).to_pylist()
            found.update(zip(inside.tolist(), entries, strict=True))
        first += len(batch)
    return found


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


def _array(batch: pyarrow.RecordBatch, dim: int) -> np.ndarray:
    values = batch.column("embedding").flatten().to_numpy()
    return values.reshape(-1, dim).astype(np.float32, copy=False)
