"""Find similar images by the cosine similarity of their embeddings.

Up to a million rows, all are compared, in blocks, so that memory does not grow with the table.
Beyond that, an HNSW graph is searched (Yu. A. Malkov and D. A. Yashunin, "Efficient and robust
approximate nearest neighbor search using Hierarchical Navigable Small World graphs",
https://arxiv.org/abs/1603.09320), which is built once and stored next to the table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from backbones.embedding.hnsw import open_graph
from backbones.embedding.rows import blocks, by_number, unit
from backbones.embedding.table import count_rows, metadata

__all__ = ["EXACT_ROWS", "INDEXES", "Match", "choose_index", "search"]

EXACT_ROWS = 1_000_000
"""Most rows that ``index="auto"`` searches exhaustively."""
INDEXES = ("auto", "exact", "hnsw")


@dataclass(frozen=True)
class Match:
    """A search result.

    Attributes:
        row: its row number in the table.
        score: cosine of its embedding with the query's, -1 … 1.
    """

    key: str
    row: int
    score: float


def choose_index(index: str, rows: int, exact_rows: int = EXACT_ROWS) -> str:
    """Resolve ``index`` to ``"exact"`` or ``"hnsw"``.

    Args:
        index: one of :data:`INDEXES`; ``"auto"`` chooses by ``rows``.
    """
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
        folder: of the table.
        vectors: (queries, dim), of any norm.
        top: most matches per query; fewer if the table is smaller.
        index: ``"exact"`` compares all rows; ``"hnsw"`` may miss a few, and needs faiss-cpu and
            memory for all rows; ``"auto"`` uses it beyond :data:`EXACT_ROWS`.
        without: for each query, a row to exclude, such as its own.
        progress: show a bar on standard error while a graph is built, if that is a terminal.

    Raises:
        ValueError: ``vectors`` of another shape or not finite, or ``top`` below 1.
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
        scores, numbers = open_graph(folder, progress).search(queries, most)
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
