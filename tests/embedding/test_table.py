"""Reading a table reports shards that are missing, damaged or from another table."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from embedding_tables import make_table

from backbones.embedding import table
from backbones.embedding.table import writing_shard

VECTORS = np.arange(24, dtype=np.float32).reshape(6, 4)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A table of two shards with three rows each."""
    return make_table(tmp_path / "table", VECTORS, rows=3)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_round_trip(tmp_path, dtype):
    sizes = [(5, 6 + row) for row in range(6)]
    folder = make_table(tmp_path / "table", VECTORS, "abcdef", sizes, rows=3, dtype=dtype)
    keys, vectors = table.load(folder)
    assert keys == list("abcdef") and vectors.dtype == np.float32
    assert np.array_equal(vectors, VECTORS)
    (first, second) = table.batches(folder)
    assert first.schema.field("embedding").type.value_type == getattr(pa, dtype)()
    assert second.column("height").to_pylist() == [5, 5, 5]
    assert second.column("width").to_pylist() == [9, 10, 11]


def test_columns_can_be_chosen(folder):
    assert [b.schema.names for b in table.batches(folder, ["width"], rows=2)] == [["width"]] * 4
    with pytest.raises(ValueError, match="has no column classes; its columns are key, height"):
        next(table.batches(folder, ["classes"]))


def test_shards_of_another_table(folder):
    content = table.metadata(folder)
    for name, sha256, is_same in (("a.pth", "13" * 32, False), ("copy.pth", "0" * 64, True)):
        weights = {**content["weights"], "file": name, "sha256": sha256}
        table.write_metadata(folder, {**content, "weights": weights})
        if is_same:
            assert len(table.load(folder)[0]) == 6
        else:
            with pytest.raises(table.TableError, match=r"part-00000.parquet belongs to other embe"):
                table.load(folder)


def test_missing_table(tmp_path):
    with pytest.raises(FileNotFoundError, match="contains no embeddings: there is no metadata"):
        table.load(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(table.TableError, match="is a file; give the folder"):
        table.load(tmp_path / "file")


def test_differences_are_listed(folder):
    there = table.metadata(folder)
    source, preprocessing = {**there["source"], "digest": "4"}, {"crop_pct": 0.9}
    for change, told in (
        ({}, []),
        ({"model": "van_b1", "shards": 3}, ["model: 'shvit_s1' there, 'van_b1' now"]),
        ({"preprocessing": preprocessing}, ["preprocessing: crop_pct 1.0 there, 0.9 now"]),
        ({"computed": "int8"}, ["computed: 'float32' there, 'int8' now"]),
        (
            {"source": source, "images": 7},
            [f"the images listed in {folder} have changed (6 there, 7"],
        ),
    ):
        before = {**there, "preprocessing": {"crop_pct": 1.0}}
        now = {**before, **change}
        found = table.differences(before, now)
        assert len(found) == len(told) and all(map(str.startswith, found, told))
        assert (table.identity(now) == table.identity(before)) is (not told)


def test_a_shard_that_fails_leaves_no_file(folder, tmp_path):
    (tmp_path / "new").mkdir()
    writing = writing_shard(tmp_path / "new" / "part.parquet", table.metadata(folder))
    with pytest.raises(ZeroDivisionError), writing as shard:
        shard.add(["a"], [(1, 1)], VECTORS[:1])
        raise ZeroDivisionError
    assert not list((tmp_path / "new").iterdir())


@pytest.mark.parametrize(("size", "groups"), [(1 << 25, 1), (16, 3), (32, 2)])
def test_large_groups_are_written_as_they_come(size, groups, tmp_path, monkeypatch):
    """Maps of many images are not accumulated in memory."""
    monkeypatch.setattr(table, "_GROUP", size)
    content = table.metadata(make_table(tmp_path / "table", VECTORS, rows=3))
    path = table.shard_path(tmp_path / "table", 0)
    with writing_shard(path, content) as shard:
        for row in range(3):
            shard.add([f"{row}.png"], [(1, 1)], VECTORS[row : row + 1])
    assert pa.parquet.ParquetFile(path).num_row_groups == groups
    assert table.load(tmp_path / "table")[0][:4] == ["0.png", "1.png", "2.png", "00003.png"]
