"""Find groups of images in a table whose embeddings are nearly equal."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from backbones.common.errors import MendableError
from backbones.common.progress import counting
from backbones.embedding.search import choose_index, nearest_in, open_graph
from backbones.embedding.table import blocks, by_number, count_rows, metadata, unit

__all__ = ["EXACT_ROWS", "THRESHOLD", "Member", "ThresholdError", "find_duplicates"]

THRESHOLD = 0.95
"""Default threshold: the smallest cosine at which two images are near-duplicates."""
EXACT_ROWS = 200_000
"""Most rows of which ``index="auto"`` compares all pairs."""

# Bytes of embeddings held in memory while all later rows are streamed past them, and rows compared
# at a time.
_HELD, _TILE = 1 << 28, 1024
# Rounding error of a cosine: that of two equal embeddings may be so much below 1.
_ROUNDING = 1e-6
# With more pairs than this, the threshold is useless: nearly all images reach it.
_MOST_PAIRS = 1_000_000_000
# Neighbours of each row to query from a graph.
_NEIGHBOURS = 64


@dataclass(frozen=True)
class Member:
    """An image of the given height and width that has near-duplicates.

    Attributes:
        row: its row number in the table.
        similarity: cosine of its embedding with that of the most similar other member.
    """

    key: str
    row: int
    height: int
    width: int
    similarity: float


def find_duplicates(
    folder: str | Path, threshold: float = THRESHOLD, index: str = "auto", progress: bool = False
) -> list[list[Member]]:
    """Find groups of near-duplicates, largest groups first.

    Two images are near-duplicates if the cosine of their embeddings is at least ``threshold``. A
    group is a connected component of such pairs, so two of its images may be less similar if others
    link them. Within a group, the image with the most pixels comes first.

    Args:
        threshold: above 0, at most 1.
        index: ``"exact"`` compares all pairs, in tiles: memory grows by 12 bytes per row, time with
            the square of the number of rows. ``"hnsw"`` compares each row with its 64 nearest
            neighbours in a graph and may miss some; it needs faiss-cpu and memory for all rows.
            ``"auto"`` uses it beyond :data:`EXACT_ROWS`.
        progress: show a bar on standard error, if that is a terminal.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold must be above 0 and at most 1, got {threshold}")
    rows = count_rows(folder)
    exact = choose_index(index, rows, EXACT_ROWS) == "exact"
    pairs = (_all_pairs if exact else _neighbours)(folder, rows, threshold, progress)
    groups, nearest, count = Groups(rows), np.full(rows, -1, np.float32), 0
    for one, other, similar in pairs:
        count += len(one)
        if count > _MOST_PAIRS:
            raise ThresholdError(
                f"more than {_MOST_PAIRS:,} pairs of images in {folder} have a cosine of at least "
                f"{threshold:g}: choose a higher threshold"
            )
        groups.join(one, other)
        np.maximum.at(nearest, one, similar)
        np.maximum.at(nearest, other, similar)
    found = np.flatnonzero(nearest > -1)
    facts = by_number(folder, found.tolist(), ["key", "height", "width"])
    members: dict[int, list[Member]] = {}
    for row, root in zip(found.tolist(), groups.find(found).tolist(), strict=True):
        similarity = min(float(nearest[row]), 1.0)
        members.setdefault(root, []).append(Member(row=row, similarity=similarity, **facts[row]))
    for group in members.values():
        group.sort(key=lambda member: (-member.height * member.width, member.row))
    return sorted(members.values(), key=lambda group: (-len(group), group[0].row))


class ThresholdError(MendableError, ValueError):
    """The threshold is so low that nearly all pairs of images reach it."""


class Groups:
    """Connected components of n items, as a union-find forest."""

    def __init__(self, n: int) -> None:
        self._above = np.arange(n)  # a lower item of the group; of its first item, itself

    def find(self, things: np.ndarray) -> np.ndarray:
        """The first item of the group of each of ``things``."""
        while True:
            above = self._above[self._above[things]]
            self._above[things] = above  # path compression
            if np.array_equal(above, things):
                return things
            things = above

    def join(self, ones: np.ndarray, others: np.ndarray) -> None:
        """Merge the groups of each pair."""
        while len(ones):
            ones, others = self.find(ones), self.find(others)
            apart = ones != others
            ones, others = ones[apart], others[apart]
            # If a root appears in several pairs, it is linked to the lowest other root. The loop
            # repeats for the remaining pairs.
            np.minimum.at(self._above, np.maximum(ones, others), np.minimum(ones, others))


Pairs = Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]


def _all_pairs(folder: str | Path, rows: int, threshold: float, progress: bool) -> Pairs:
    """Pairs that reach the threshold: rows, later rows, and their similarities."""
    dim = metadata(folder)["dim"]
    most = max(_TILE, _HELD // (4 * dim))
    starts = range(0, rows, most)
    with counting("compare", sum(rows - start for start in starts), progress) as bar:
        for start in starts:
            held, count = np.empty((min(most, rows - start), dim), np.float32), 0
            for block in blocks(folder):
                first = max(block.first, start)
                vectors = unit(block.vectors[first - block.first :])
                if taken := min(len(vectors), len(held) - count):
                    held[count : count + taken] = vectors[:taken]
                    count += taken
                yield from _tiles(held[:count], start, vectors, first, threshold)
                bar.step(count=len(vectors))


def _tiles(
    held: np.ndarray, start: int, vectors: np.ndarray, first: int, threshold: float
) -> Pairs:
    """Like :func:`_all_pairs`, between two ranges of rows that begin at ``start`` and ``first``."""
    for offset in range(0, len(held), _TILE):
        similar = held[offset : offset + _TILE] @ vectors.T
        ones, others = np.nonzero(similar >= threshold - _ROUNDING)
        later = others + first > ones + offset + start
        ones, others = ones[later], others[later]
        if len(ones):
            yield ones + offset + start, others + first, similar[ones, others]


def _neighbours(folder: str | Path, rows: int, threshold: float, progress: bool) -> Pairs:
    """Like :func:`_all_pairs`, but approximate: each row with its nearest rows in a graph."""
    graph = open_graph(folder, progress)
    with counting("compare", rows, progress) as bar:
        for block in blocks(folder):
            similar, others = nearest_in(graph, unit(block.vectors), min(_NEIGHBOURS, rows))
            ones = np.broadcast_to(block.first + np.arange(len(block.keys))[:, None], others.shape)
            near = (similar >= threshold - _ROUNDING) & (others >= 0) & (others != ones)
            yield ones[near], others[near], similar[near]
            bar.step(count=len(block.keys))
