"""A faiss HNSW graph of a table of embeddings, stored next to the table."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from backbones.common.errors import MendableError
from backbones.common.files import replacing
from backbones.common.memory import available_memory
from backbones.common.messages import first_line, one_line
from backbones.common.progress import counting
from backbones.embedding.checksum import append_checksum, verify
from backbones.embedding.rows import blocks, unit
from backbones.embedding.table import count_rows, identity, metadata, shard_paths

# Links per node (M), and the candidates considered when building (efConstruction) and searching
# (efSearch).
_LINKS, _BUILD_WIDTH, _SEARCH_WIDTH = 32, 100, 128
_NAME = "hnsw-{}.faiss"


class GraphError(MendableError, RuntimeError):
    """The graph cannot be built or opened; the message says what to do."""


class Graph:
    """An approximate index that finds similar rows without comparing all of them."""

    def __init__(self, index: Any) -> None:
        self._index = index

    def search(self, queries: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
        """Scores and row numbers (queries, most) of the most similar rows, -1 where there are none.

        Args:
            queries: (queries, dim), at unit length.
        """
        self._index.hnsw.efSearch = max(_SEARCH_WIDTH, 2 * most)
        scores, numbers = self._index.search(np.ascontiguousarray(queries), most)
        return np.clip(scores, -1, 1), numbers


def open_graph(folder: str | Path, progress: bool = False) -> Graph:
    """Open the graph stored beside a table, building it if it is missing, outdated or damaged.

    It takes 4 · dim + 276 bytes per row, both in memory and on disk.

    Args:
        progress: say on standard error that a damaged graph is replaced, and show a bar while it
            is built, if that is a terminal.
    """
    try:
        import faiss
    except ImportError:
        raise GraphError(
            "the index hnsw needs faiss: pip install faiss-cpu (or '.[search]'), or "
            "choose --index exact"
        ) from None
    content = metadata(folder)
    rows, dim = count_rows(folder), content["dim"]
    path = Path(folder) / _NAME.format(identity(content)[:16])
    need = rows * (4 * dim + 4 * (2 * _LINKS + 5))
    free = available_memory(torch.device("cpu"), unknown=need)
    if need > free:
        raise GraphError(
            f"a graph over {rows} rows of {dim} would take {need / 2**30:.1f} GiB of memory, and "
            f"{free / 2**30:.1f} GiB are free; --index exact needs hardly any"
        )
    if path.is_file() and path.stat().st_mtime >= _newest(folder):
        if (kept := _read(path, rows, dim)) is not None:
            return Graph(kept)
        if progress:
            sys.stderr.write(
                f"the index {one_line(str(path))} is damaged or from an earlier version: "
                "rebuilding it\n"
            )
    index = faiss.IndexHNSWFlat(dim, _LINKS, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction = _BUILD_WIDTH
    with counting("index", rows, progress) as bar:
        for block in blocks(folder):
            index.add(unit(block.vectors))
            bar.step(count=len(block.keys))
    _keep(index, path)
    return Graph(index)


def _read(path: Path, rows: int, dim: int) -> Any:
    """The stored graph; None if it is damaged, or an earlier version wrote it without a checksum.

    faiss itself believes what a file says: a flipped bit may make it hang or take all memory.
    """
    import faiss

    try:
        index = faiss.read_index(str(path)) if verify(path) else None
    except (OSError, RuntimeError):
        return None
    fits = isinstance(index, faiss.IndexHNSWFlat) and (index.ntotal, index.d) == (rows, dim)
    return index if fits else None


def _newest(folder: str | Path) -> float:
    """Modification time of the newest shard."""
    return max((shard.stat().st_mtime for shard in shard_paths(folder)), default=0.0)


def _keep(index: Any, path: Path) -> None:
    """Write the graph atomically, replacing graphs of earlier versions of the table."""
    import faiss

    try:
        with replacing(path, unique=True) as temporary:
            faiss.write_index(index, str(temporary))
            append_checksum(temporary)
            for earlier in path.parent.glob(_NAME.format("*")):
                earlier.unlink()
    except (OSError, RuntimeError) as error:
        raise GraphError(f"cannot write {path}: {first_line(error)}") from error
