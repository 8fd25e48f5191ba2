"""Groups of near-duplicates."""

from __future__ import annotations

import numpy as np
import pytest
from embedding_tables import make_table

from backbones.embedding import duplicates
from backbones.embedding.duplicates import ThresholdError, find_duplicates


def at_angles(degrees: list[float]) -> np.ndarray:
    angles = np.deg2rad(degrees)
    return np.stack((np.cos(angles), np.sin(angles)), axis=1).astype(np.float32)


@pytest.mark.parametrize("index", ["exact", "hnsw"])
def test_chains_are_groups(index, tmp_path):
    """10° is near: of three images, the outer two are near the middle one, not each other."""
    vectors = at_angles([0, 90, 10, 180, 20, 185, 270]) * np.arange(1, 8)[:, None]
    sizes = [(8, 8), (9, 9), (8, 9), (1, 7), (8, 9), (7, 1), (9, 9)]
    table = make_table(tmp_path / "table", vectors.astype(np.float32), sizes=sizes, rows=3)
    groups = find_duplicates(table, threshold=0.98, index=index)
    assert [[member.row for member in group] for group in groups] == [[2, 4, 0], [3, 5]]
    first = groups[0][0]
    assert (first.key, first.height, first.width) == ("00002.png", 8, 9)
    ten, five = np.cos(np.deg2rad((10, 5)))
    similar = [[member.similarity for member in group] for group in groups]
    np.testing.assert_allclose(np.concatenate(similar), [ten] * 3 + [five] * 2, atol=1e-6)


def reference(vectors: np.ndarray, threshold: float) -> set[tuple[int, ...]]:
    """Groups by repeated passes over all rows."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    near = (vectors / lengths) @ (vectors / lengths).T >= threshold
    groups, left = set(), set(range(len(vectors)))
    while left:
        group, new = set(), {min(left)}
        while new:
            group |= new
            new = {int(i) for row in new for i in np.flatnonzero(near[row])} - group
        left -= group
        if len(group) > 1:
            groups.add(tuple(sorted(group)))
    return groups


@pytest.mark.parametrize(("threshold", "tile"), [(0.5, 7), (0.9, 7), (0.5, 1024)])
@pytest.mark.parametrize("held", [1, 1 << 28], ids=["several passes", "one pass"])
def test_by_hand(threshold, tile, held, tmp_path, monkeypatch):
    vectors = np.random.default_rng(0).normal(size=(200, 5)).astype(np.float32)
    table = make_table(tmp_path / "table", vectors, rows=33)
    monkeypatch.setattr(duplicates, "_TILE", tile)
    monkeypatch.setattr(duplicates, "_HELD", held)
    groups = find_duplicates(table, threshold)
    found = {tuple(sorted(member.row for member in group)) for group in groups}
    assert found == reference(vectors, threshold) and found
    assert [len(group) for group in groups] == sorted((len(g) for g in groups), reverse=True)


@pytest.mark.parametrize("index", ["exact", "hnsw"])
def test_equal_images_at_a_threshold_of_one(index, tmp_path):
    vectors = np.random.default_rng(0).normal(size=(40, 300)).astype(np.float32)
    vectors[30] = vectors[7]
    groups = find_duplicates(make_table(tmp_path / "table", vectors), 1, index)
    assert [[member.row for member in group] for group in groups] == [[7, 30]]
    assert [member.similarity for member in groups[0]] == pytest.approx([1, 1])


def test_none(tmp_path):
    for threshold in (0, 1.01, float("nan")):
        with pytest.raises(ValueError, match=r"threshold must be above 0 and at most 1, got"):
            find_duplicates(tmp_path, threshold)
    assert find_duplicates(make_table(tmp_path / "a", np.eye(4, dtype=np.float32))) == []
    assert find_duplicates(make_table(tmp_path / "b", np.empty((0, 4), np.float32))) == []
    # Zero vectors are similar to nothing, not even to each other.
    assert find_duplicates(make_table(tmp_path / "c", np.zeros((4, 4), np.float32))) == []


def test_all_equal(tmp_path, monkeypatch):
    table = make_table(tmp_path / "table", np.ones((60, 4), np.float32))
    (group,) = find_duplicates(table)
    assert [member.row for member in group] == list(range(60))
    monkeypatch.setattr(duplicates, "_MOST_PAIRS", 60 * 59 // 2 - 1)
    with pytest.raises(ThresholdError, match=r"have a cosine of at least 0.95: choose a higher"):
        find_duplicates(table)
