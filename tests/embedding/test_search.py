"""Search for rows similar to a query, exhaustively or with a graph."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from embedding_tables import make_table

from backbones.embedding import search as search_module
from backbones.embedding.search import GraphError, choose_index, search
from backbones.embedding.table import unit, vectors_of


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    """Vectors of various norms, which do not affect cosines."""
    generator = np.random.default_rng(0)
    numbers = generator.normal(size=(300, 16)) * generator.uniform(0.1, 50, (300, 1))
    return numbers.astype(np.float32)


@pytest.fixture(scope="module")
def table(vectors: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_table(tmp_path_factory.mktemp("search") / "table", vectors)


def cosines(queries: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(queries, axis=1)[:, None] * np.linalg.norm(vectors, axis=1)
    return queries @ vectors.T / lengths


@pytest.mark.parametrize("index", ["exact", "hnsw"])
def test_the_most_similar_come_first(index, table, vectors):
    queries = np.random.default_rng(1).normal(size=(4, 16)).astype(np.float32)
    found = search(table, queries, top=7, index=index)
    expected = cosines(queries, vectors)
    for matches, similar in zip(found, expected, strict=True):
        best = np.argsort(-similar)[:7]
        assert [match.row for match in matches] == best.tolist()
        assert [match.key for match in matches] == [f"{row:05}.png" for row in best]
        np.testing.assert_allclose([m.score for m in matches], similar[best], atol=1e-5)


@pytest.mark.parametrize("index", ["exact", "hnsw"])
def test_a_query_of_the_table_itself(index, table):
    rows, vectors = vectors_of(table, ["00070.png", "00003.png"])
    assert rows == [70, 3]
    with_itself = search(table, vectors, 2, index)
    assert [matches[0].row for matches in with_itself] == rows
    assert with_itself[0][0].score == pytest.approx(1, abs=1e-5)
    others = search(table, vectors, 2, index, without=rows)
    assert [matches[0] for matches in others] == [matches[1] for matches in with_itself]
    for without in (rows, [None, rows[1]]):
        others = search(table, vectors, 2, index, without)
        assert [len(matches) for matches in others] == [2, 2]


@pytest.mark.parametrize("index", ["exact", "hnsw"])
def test_more_than_there_are(index, tmp_path):
    table = make_table(tmp_path / "table", np.eye(3, dtype=np.float32))
    (matches,) = search(table, np.array([[3, 2, 1]], np.float32), top=9, index=index)
    assert [match.row for match in matches] == [0, 1, 2]
    (others,) = search(table, np.array([[3, 2, 1]], np.float32), 9, index, without=[1])
    assert [match.row for match in others] == [0, 2]
    assert search(table, np.empty((0, 3), np.float32)) == []


def test_ties_prefer_earlier_rows(tmp_path):
    table = make_table(tmp_path / "table", np.ones((120, 4), np.float32))
    (matches,) = search(table, np.ones((1, 4), np.float32), top=3)
    assert [match.row for match in matches] == [0, 1, 2]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_zero_vectors_come_last(dtype, tmp_path):
    """In float16, a sum may overflow."""
    vectors = np.array([[np.inf, 1], [np.nan, 1], [0, 0], [6e4, 6e4], [1e-7, 0]], np.float32)
    table = make_table(tmp_path / "table", vectors, dtype=dtype)
    (matches,) = search(table, np.array([[1, 0.9]], np.float32), top=5)
    assert [match.row for match in matches] == [3, 4, 0, 1, 2]
    assert [match.score for match in matches[2:]] == [0, 0, 0]
    assert vectors_of(table, ["00003.png"])[0] == [3]
    for key in ("00000.png", "00001.png"):
        with pytest.raises(ValueError, match=f"the embedding of '{key}' in .* is not finite"):
            vectors_of(table, ["00003.png", key])
    lengths = np.linalg.norm(unit(np.array([[3e38, 3e38], [1e-38, 0], [4, 3]])), axis=1)
    np.testing.assert_allclose(lengths, 1, rtol=1e-6)


def test_the_graph_is_kept_until_rows_change(vectors, tmp_path):
    table = make_table(tmp_path / "table", vectors)
    first = search(table, vectors[:2], index="hnsw")
    (path,) = table.glob("hnsw-*.faiss")
    before = path.stat().st_ino
    assert search(table, vectors[:2], index="hnsw") == first
    assert path.stat().st_ino == before
    path.write_bytes(path.read_bytes()[:1000])
    assert search(table, vectors[:2], index="hnsw") == first
    assert path.stat().st_ino != before
    before = path.stat().st_ino
    shard = table / "shards" / "part-00000.parquet"
    os.utime(shard, (0, path.stat().st_mtime + 1e6))
    assert search(table, vectors[:2], index="hnsw") == first
    assert path.stat().st_ino != before
    assert {p.name for p in table.iterdir()} == {"metadata.json", "shards", path.name}


def test_index_by_the_number_of_rows():
    assert choose_index("auto", 1_000_000) == "exact"
    assert choose_index("auto", 1_000_001) == "hnsw"
    assert choose_index("exact", 10**9) == "exact"


def test_a_graph_larger_than_the_memory(table, vectors, monkeypatch):
    monkeypatch.setattr(search_module, "available_memory", lambda device, unknown: 1000)
    with pytest.raises(GraphError, match="a graph over 300 rows of 16 would take"):
        search(table, vectors[:1], index="hnsw")


def test_a_graph_that_cannot_be_written(vectors, tmp_path, monkeypatch):
    import faiss

    def full(index: object, path: str) -> None:
        Path(path).write_bytes(b"half")
        raise RuntimeError("Error: 'f' failed: No space left on device")

    table = make_table(tmp_path / "table", vectors)
    monkeypatch.setattr(faiss, "write_index", full)
    with pytest.raises(GraphError, match=r"cannot write .*hnsw-.*No space left"):
        search(table, vectors[:1], index="hnsw")
    assert {p.name for p in table.iterdir()} == {"metadata.json", "shards"}


def test_bad_input(table, vectors):
    for bad, options, said in (
        (np.ones((1, 4), np.float32), {}, r"vectors must be \(queries, 16\) .* got \(1, 4\)"),
        (np.full((1, 16), np.nan, np.float32), {}, "vectors must be finite"),
        (vectors[:1], {"top": 0}, "top must be at least 1, got 0"),
        (vectors[:1], {"index": "flat"}, "index must be auto, exact or hnsw, got 'flat'"),
    ):
        with pytest.raises(ValueError, match=said):
            search(table, bad, **options)
    told = "no image with the key 'x'; its keys look like '00000.png'"
    with pytest.raises(ValueError, match=told):
        vectors_of(table, ["00001.png", "x"])
