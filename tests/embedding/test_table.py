"""Reading a table reports shards that are missing, damaged or from another table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from backbones.embedding import shard_writer, table
from backbones.embedding.shard_writer import ShardWriter

CONTENT: dict[str, Any] = {
    **{"model": "van_b0", "weights": {"file": "a.pth", "sha256": "12"}, "preprocessing": {}},
    **{"features": "head", "shape": [2, 2], "dim": 4, "dtype": "float32", "computed": "float32"},
    **{"classes": 0, "names": [], "source": {"kind": "folder", "path": "/x", "digest": "3"}},
    **{"images": 6, "shards": 2, "rows": 3, "versions": {}},
}


def written(folder: Path, shards: int = 2, **changes: Any) -> Path:
    """Write a table with three rows per shard, and two more columns if ``classes`` is set."""
    (folder / "shards").mkdir()
    content = {**CONTENT, **changes}
    table.write_metadata(folder, content)
    schema = table.schema(4, content["dtype"], bool(content["classes"]))
    for number in range(shards):
        vectors = np.arange(12, dtype=np.float32).reshape(3, 4) + 12 * number
        answers = (np.array([[1, 0]] * 3), np.full((3, 2), 0.5, np.float32))
        path = table.shard_path(folder, number)
        with ShardWriter(path, schema, table.identity(content)) as shard:
            for i in range(3):
                more = [answer[i : i + 1] for answer in answers] if content["classes"] else []
                shard.add([f"{number}/{i}.png"], [(5, 6)], vectors[i : i + 1], *more)
            shard.add_corrupt(f"{number}/bad.png", "OSError: it does not exist")
    return folder


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("classes", [0, 2])
def test_round_trip(tmp_path, dtype, classes):
    folder = written(tmp_path, dtype=dtype, classes=classes)
    keys, vectors = table.load(folder)
    assert keys == [f"{shard}/{i}.png" for shard in (0, 1) for i in range(3)]
    assert vectors.dtype == np.float32
    assert np.array_equal(vectors, np.arange(24).reshape(6, 4))
    (first, second) = table.batches(folder)
    assert first.schema.field("embedding").type.value_type == getattr(pa, dtype)()
    assert second.column("height").to_pylist() == [5, 5, 5]
    assert ("classes" in first.schema.names) == bool(classes)
    if classes:
        assert first.column("classes").to_pylist() == [[1, 0]] * 3
    noted = table.corrupt_in(
        table.shard_path(folder, 1), table.identity({**CONTENT, "dtype": dtype, "classes": classes})
    )
    assert noted == (3, [("1/bad.png", "OSError: it does not exist")])


def test_columns_can_be_chosen(tmp_path):
    folder = written(tmp_path)
    assert [b.schema.names for b in table.batches(folder, ["width"], rows=2)] == [["width"]] * 4
    with pytest.raises(ValueError, match="has no column classes; its columns are key, height"):
        next(table.batches(folder, ["classes"]))


def test_shards_of_another_table(tmp_path):
    folder = written(tmp_path)
    table.write_metadata(folder, {**CONTENT, "weights": {"file": "a.pth", "sha256": "13"}})
    with pytest.raises(table.TableError, match=r"part-00000.parquet belongs to other embeddings"):
        table.load(folder)
    table.write_metadata(folder, {**CONTENT, "weights": {"file": "copy.pth", "sha256": "12"}})
    assert len(table.load(folder)[0]) == 6


@pytest.mark.parametrize("text", ["{", "[]", '{"format": 2}', '{"format": 1}', "[" * 100_000])
def test_metadata_of_something_else(tmp_path, text):
    (tmp_path / "metadata.json").write_text(text)
    with pytest.raises(table.TableError, match=r"metadata\.json (is damaged|does not|lacks)"):
        table.metadata(tmp_path)


def test_missing_table(tmp_path):
    with pytest.raises(FileNotFoundError, match="contains no embeddings: there is no metadata"):
        table.load(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(table.TableError, match="is a file; give the folder"):
        table.load(tmp_path / "file")


def test_differences_are_listed():
    now = json.loads(json.dumps(CONTENT))
    assert table.differences(CONTENT, now) == []
    now |= {"model": "van_b1", "preprocessing": {"crop_pct": 0.9}, "shards": 3}
    assert table.differences({**CONTENT, "preprocessing": {"crop_pct": 1.0}}, now) == [
        "model: 'van_b0' there, 'van_b1' now",
        "preprocessing: crop_pct 1.0 there, 0.9 now",
    ]
    now = {**CONTENT, "computed": "int8"}
    assert table.differences(CONTENT, now) == ["computed: 'float32' there, 'int8' now"]
    assert table.identity(now) != table.identity(CONTENT)
    now = {**CONTENT, "source": {**CONTENT["source"], "digest": "4"}, "images": 7}
    (told,) = table.differences(CONTENT, now)
    assert told == "the images listed in /x have changed (6 there, 7 now)"


@pytest.mark.parametrize(("dim", "dtype"), [(0, "float32"), (4, "float64")])
def test_unknown_schemas(dim, dtype):
    with pytest.raises(ValueError, match="must be"):
        table.schema(dim, dtype)


def test_shards_of_several_groups_are_read_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(shard_writer, "_GROUP", 16)
    folder = written(tmp_path)
    assert pa.parquet.ParquetFile(table.shard_path(folder, 0)).num_row_groups == 3
    assert len(table.load(folder)[0]) == 6
