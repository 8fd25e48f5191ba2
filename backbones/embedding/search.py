"""Find similar images by the cosine similarity of their embeddings.

Up to a million rows, all are compared, in blocks, so that memory does not grow with the table.
Beyond that, an HNSW graph is searched (Yu. A. Malkov and D. A. Yashunin, "Efficient and robust
approximate nearest neighbor search using Hierarchical Navigable Small World graphs",
https://arxiv.org/abs/1603.09320), which is built once and stored next to the table.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from backbones.common.errors import MendableError, required
from backbones.common.files import replacing
from backbones.common.memory import available_memory
from backbones.common.messages import first_line, one_line
from backbones.common.progress import counting
from backbones.embedding.checksum import append_checksum, verify
from backbones.embedding.table import (
    blocks,
    by_number,
    count_rows,
    identity,
    metadata,
    shard_paths,
    unit,
)

__all__ = ["EXACT_ROWS", "INDEXES", "GraphError", "Match", "choose_index", "search"]

EXACT_ROWS = 1_000_000
"""Most rows that ``index="auto"`` searches exhaustively."""
INDEXES = ("auto", "exact", "hnsw")

# Links per node of the graph (M), and the candidates considered when building (efConstruction) and
# searching (efSearch).
_LINKS, _BUILD_WIDTH, _SEARCH_WIDTH = 32, 100, 128
_NAME = "hnsw-{}.faiss"


class GraphError(MendableError, RuntimeError):
    """The graph cannot be built or opened; the message says what to do."""


@dataclass(frozen=True)
class Match:
    """A search result: a row of the table, and the cosine of its embedding with the query's."""

    key: str
    row: int
    score: float


def choose_index(index: str, rows: int, exact_rows: int = EXACT_ROWS) -> str:
    """``"exact"`` or ``"hnsw"``; for ``"auto"``, by the number of rows."""
    if index not in INDEXES:
        raise ValueError(f"index must be {', '.join(INDEXES[:-1])} or {INDEXES[-1]}, got {index!r}")
    if index == "auto":
        return "exact" if rows <= exact_rows else "hnsw"
    return index


def search(
    folder: str | Path,
    vectors: np.ndarray,
    top: int = 12,
    index: str = "auto",
    without: Sequence[int | None] | None = None,
    progress: bool = False,
) -> list[list[Match]]:
    """Find the rows of a table most similar to each of ``vectors``, best first.

    Args:
        vectors: (queries, dim), of any norm.
        top: most matches per query; fewer if the table is smaller.
        index: ``"exact"`` compares all rows; ``"hnsw"`` may miss a few, and needs faiss-cpu and
            memory for all rows; ``"auto"`` uses it beyond :data:`EXACT_ROWS`.
        without: for each query, a row to exclude, such as its own.
        progress: show a bar on standard error while a graph is built, if that is a terminal.
    """
    dim = metadata(folder)["dim"]
    if vectors.ndim != 2 or vectors.shape[1] != dim:
        raise ValueError(
            f"vectors must be (queries, {dim}) for {folder}, got {tuple(vectors.shape)}"
        )
    if not np.isfinite(vectors).all():
        raise ValueError("vectors must be finite")
    if top < 1:
        raise ValueError(f"top must be at least 1, got {top}")
    own = [None] * len(vectors) if without is None else list(without)
    rows = count_rows(folder)
    most = min(top + any(row is not None for row in own), rows)
    if not most or not len(vectors):
        return [[] for _ in own]
    queries = unit(vectors)
    if choose_index(index, rows) == "exact":
        scores, numbers = _exact(folder, queries, most)
    else:
        scores, numbers = nearest_in(open_graph(folder, progress), queries, most)
    found = [
        [pair for pair in zip(n, s, strict=True) if pair[0] not in (-1, left_out)][:top]
        for n, s, left_out in zip(numbers.tolist(), scores.tolist(), own, strict=True)
    ]
    keys = by_number(folder, {number for pairs in found for number, _ in pairs}, ["key"])
    return [[Match(keys[n]["key"], n, score) for n, score in pairs] for pairs in found]


def _exact(folder: str | Path, queries: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores and row numbers (queries, most), best first; ties go to the earlier row."""
    scores = np.full((len(queries), most), -np.inf, np.float32)
    numbers = np.full((len(queries), most), -1, np.int64)
    for block in blocks(folder):
        similar = queries @ unit(block.vectors).T  # (queries, rows)
        for i in range(len(queries)):
            better = np.flatnonzero(similar[i] > scores[i, -1])
            if len(better):
                both = np.concatenate((scores[i], similar[i, better]))
                rows = np.concatenate((numbers[i], block.first + better))
                order = np.argsort(-both, kind="stable")[:most]
                scores[i], numbers[i] = both[order], rows[order]
    return np.clip(scores, -1, 1), numbers


# -- graphs ----------------------------------------------------------------------------------------


def nearest_in(graph: Any, queries: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores and row numbers (queries, most) of the most similar rows, -1 where there are none.

    Args:
        graph: from :func:`open_graph`.
        queries: (queries, dim), at unit length.
    """
    graph.hnsw.efSearch = max(_SEARCH_WIDTH, 2 * most)
    scores, numbers = graph.search(np.ascontiguousarray(queries), most)
    return np.clip(scores, -1, 1), numbers


def open_graph(folder: str | Path, progress: bool = False) -> Any:
    """Open faiss's graph beside a table; build it if it is missing, outdated or damaged.

    Args:
        progress: say on standard error that a damaged graph is replaced, and show a bar while it
            is built, if that is a terminal.
    """
    faiss = required("faiss", "the index hnsw (not --index exact)", "faiss-cpu", GraphError)
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
    newest = max((shard.stat().st_mtime for shard in shard_paths(folder)), default=0.0)
    if path.is_file() and path.stat().st_mtime >= newest:
        # faiss believes what a file says: a flipped bit may make it hang or take all memory.
        with contextlib.suppress(OSError, RuntimeError):
            kept = faiss.read_index(str(path)) if verify(path) else None
            if isinstance(kept, faiss.IndexHNSWFlat) and (kept.ntotal, kept.d) == (rows, dim):
                return kept
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
    try:
        with replacing(path, unique=True) as temporary:
            faiss.write_index(index, str(temporary))
            append_checksum(temporary)
            for earlier in path.parent.glob(_NAME.format("*")):
                earlier.unlink()
    except (OSError, RuntimeError) as error:
        raise GraphError(f"cannot write {path}: {first_line(error)}") from error
    return index
