"""Groups of images in a table whose embeddings hardly differ."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from backbones.core.console import MendableError
from backbones.embedding.hnsw import open_graph
from backbones.embedding.rows import blocks, by_number, count_rows, unit
from backbones.embedding.search import choose_index
from backbones.embedding.table import metadata

__all__ = ["EXACT_ROWS", "THRESHOLD", "Member", "ThresholdError", "find_duplicates"]

THRESHOLD = 0.95
"""The cosine from which on two images are near-duplicates, if no other is given."""
EXACT_ROWS = 200_000
"""Of so many rows each pair is compared unless something else is asked for."""

# Bytes of embeddings that are held while all that follow them pass by, and rows compared at a time.
_HELD, _TILE = 1 << 28, 1024
# What the cosine of two equal embeddings may lack of 1.
_ROUNDING = 1e-6
# More pairs than these are no near-duplicates: nearly all images are alike to the model.
_MOST_PAIRS = 1_000_000_000
# How many neighbours of each row a graph is asked for.
_NEIGHBOURS = 64


@dataclass(frozen=True)
class Member:
    """An image that has near-duplicates.

    Attributes:
        row: its number in the table.
        height, width: of the image in its file.
        similarity: to the most similar other member, the cosine of the two embeddings.
    """

    key: str
    row: int
    height: int
    width: int
    similarity: float


def find_duplicates(
    folder: str | Path,
    threshold: float = THRESHOLD,
    index: str = "auto",
    progress: bool = False,
) -> list[list[Member]]:
    """Find groups of near-duplicates, largest groups first.

    Two images are near-duplicates if the cosine of their embeddings is at least ``threshold``. A
    group is all that hangs together by such pairs: of two images in it that are less similar, both
    resemble a third one. In a group the image of most pixels comes first.

    Args:
        folder: of the table.
        threshold: above 0, at most 1.
        index: ``"exact"`` compares all pairs, in tiles: memory grows by 12 bytes a row, time with
            their square. ``"hnsw"`` compares each row with its 64 nearest, which a graph finds,
            and may miss some (faiss-cpu, memory for all rows). ``"auto"`` takes it beyond
            :data:`EXACT_ROWS`.
        progress: show a bar on standard error, if that is a terminal.

    Raises:
        ValueError: ``threshold`` out of its range, or no such ``index``.
        FileNotFoundError, TableError: see :func:`backbones.embedding.table.batches`.
        ThresholdError: nearly all pairs of many images reach it.
        GraphError: see :func:`backbones.embedding.hnsw.open_graph`.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold must be above 0 and at most 1, got {threshold}")
    rows = count_rows(folder)
    exact = choose_index(index, rows, EXACT_ROWS) == "exact"
    pairs = (_all_pairs if exact else _neighbours)(folder, rows, threshold, progress)
    groups, nearest = Groups(rows), np.full(rows, -1, np.float32)
    count = 0
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
    """A threshold that nearly all pairs of images reach."""


class Groups:
    """Connected components of n items; edges are added in batches.

    Each thing points to one of a lower number in its group, the first to itself.
    """

    def __init__(self, n: int) -> None:
        self._above = np.arange(n)

    def find(self, things: np.ndarray) -> np.ndarray:
        """The first thing of the group of each."""
        while True:
            above = self._above[self._above[things]]
            self._above[things] = above  # the way is shorter next time
            if np.array_equal(above, things):
                return things
            things = above

    def join(self, ones: np.ndarray, others: np.ndarray) -> None:
        """Put the groups of each pair together."""
        while len(ones):
            ones, others = self.find(ones), self.find(others)
            apart = ones != others
            ones, others = ones[apart], others[apart]
            # Of several that one is to point to, the lowest counts; the others are still apart.
            np.minimum.at(self._above, np.maximum(ones, others), np.minimum(ones, others))


Pairs = Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]


def _all_pairs(folder: str | Path, rows: int, threshold: float, progress: bool) -> Pairs:
    """Rows, other rows that come later, and their similarity, of pairs that are similar enough."""
    dim = metadata(folder)["dim"]
    most = max(_TILE, _HELD // (4 * dim))
    starts = range(0, rows, most)
    with _bar(sum(rows - start for start in starts), progress) as bar:
        for start in starts:
            held, count = np.empty((min(most, rows - start), dim), np.float32), 0
            for block in blocks(folder):
                first = max(block.first, start)
                vectors = unit(block.vectors[first - block.first :])
                if taken := min(len(vectors), len(held) - count):
                    held[count : count + taken] = vectors[:taken]
                    count += taken
                yield from _tiles(held[:count], start, vectors, first, threshold)
                bar.update(len(vectors))


def _tiles(
    held: np.ndarray, start: int, vectors: np.ndarray, first: int, threshold: float
) -> Pairs:
    """As :func:`_all_pairs`, between two ranges of rows that begin at ``start`` and ``first``."""
    for offset in range(0, len(held), _TILE):
        similar = held[offset : offset + _TILE] @ vectors.T
        ones, others = np.nonzero(similar >= threshold - _ROUNDING)
        later = others + first > ones + offset + start
        ones, others = ones[later], others[later]
        if len(ones):
            yield ones + offset + start, others + first, similar[ones, others]


def _neighbours(folder: str | Path, rows: int, threshold: float, progress: bool) -> Pairs:
    """As :func:`_all_pairs`, of each row and its nearest, as far as a graph finds them."""
    graph = open_graph(folder, progress)
    with _bar(rows, progress) as bar:
        for block in blocks(folder):
            similar, others = graph.search(unit(block.vectors), min(_NEIGHBOURS, rows))
            ones = np.broadcast_to(block.first + np.arange(len(block.keys))[:, None], others.shape)
            near = (similar >= threshold - _ROUNDING) & (others >= 0) & (others != ones)
            yield ones[near], others[near], similar[near]
            bar.update(len(block.keys))


def _bar(total: int, shown: bool) -> Any:
    from tqdm import tqdm

    silent = not (shown and sys.stderr.isatty())
    return tqdm(total=total, unit="row", unit_scale=True, leave=False, disable=silent)
