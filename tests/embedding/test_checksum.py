"""A flipped bit in a table's files is noticed, wherever it is, and mended by the same command."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
from embedding_runs import make_photos, same, words
from embedding_tables import make_table, rewrite

from backbones.cli.main import main
from backbones.embedding import table
from backbones.embedding.search import search


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    vectors = np.random.default_rng(0).normal(size=(40, 6)).astype(np.float32)
    keys = [f"{'ab'[row % 2]}/{row:02}.png" for row in range(40)]
    return make_table(tmp_path / "table", vectors, keys, rows=20)


def flip(path: Path, place: int, bit: int = 3) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1 << bit
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("name", "kind", "value"),
    [
        ("key", pyarrow.binary(), b"a"),
        ("height", pyarrow.string(), "1"),
        ("embedding", pyarrow.list_(pyarrow.float32(), 3), [1.0] * 3),
        ("embedding", pyarrow.list_(pyarrow.float16(), 6), [np.float16(1)] * 6),
        ("embedding", pyarrow.list_(pyarrow.float32()), [1.0] * 6),
        ("embedding", pyarrow.float32(), 1.0),
    ],
)
def test_columns_of_other_types(name, kind, value, folder):
    rewrite(table.shard_path(folder, 0), pyarrow.array([value] * 20, kind), name)
    with pytest.raises(table.DamagedShardError, match="columns differ from those in metadata.json"):
        table.load(folder)


def test_shards_without_checksums_are_read(folder):
    (keys, vectors), path = table.load(folder), table.shard_path(folder, 1)
    rewrite(path)
    after = table.load(folder)
    assert after[0] == keys and np.array_equal(after[1], vectors)
    assert table.corrupt_in(path, table.metadata(folder)) == (20, [])
    assert table.count_rows(folder) == 40


def _flip_an_embedding(path: Path) -> None:
    vector = pyarrow.parquet.read_table(path).column("embedding")[0].values.to_numpy()
    flip(path, path.read_bytes().index(vector.tobytes()) + 2)


def _without_embeddings(path: Path) -> None:
    column = pyarrow.parquet.read_table(path).column("embedding")
    rewrite(path, pyarrow.array([None] * len(column), column.type))


def _with_null_numbers(path: Path) -> None:
    column = pyarrow.parquet.read_table(path).column("embedding")
    numbers = pyarrow.array([None] * (column.type.list_size * len(column)), pyarrow.float32())
    rewrite(path, pyarrow.FixedSizeListArray.from_arrays(numbers, type=column.type))


def test_a_flipped_bit_of_a_large_shard(tmp_path):
    folder = make_table(tmp_path / "table", np.eye(2, 2**20, dtype=np.float32))
    _flip_an_embedding(table.shard_path(folder, 0))
    with pytest.raises(table.DamagedShardError, match="its checksum is wrong"):
        table.load(folder)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Path:
    """A table of embeddings, beside its photographs."""
    photos = make_photos(tmp_path_factory.mktemp("embedded") / "photos", 10)
    assert main(words(photos, photos.parent / "whole", checkpoint)) == 0
    return photos.parent / "whole"


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (_flip_an_embedding, "its checksum is wrong"),
        (_without_embeddings, "its columns differ from those in metadata.json"),
        (_with_null_numbers, "it has rows without embedding"),
        (
            lambda path: path.write_bytes(path.read_bytes()[:-9]),
            "it is not a complete Parquet file",
        ),
    ],
)
def test_embed_mends_a_damaged_shard(damage, told, whole, checkpoint, tmp_path, capsys):
    out = shutil.copytree(whole, tmp_path / "out")
    path = table.shard_path(out, 1)
    damage(path)
    with pytest.raises(table.DamagedShardError, match=told):
        table.load(out)
    assert main(words(whole.parent / "photos", out, checkpoint)) == 0
    said = capsys.readouterr().err
    assert f"{path} is damaged ({told}); embedding it again" in said
    assert "6 images done before" in said
    assert same(out, whole)


@pytest.mark.parametrize("place", [3, 200, -400, -10])
def test_a_damaged_graph_is_built_again(place, folder, capsys):
    _, vectors = table.load(folder)
    found = search(folder, vectors[:3], index="hnsw", progress=True)
    assert capsys.readouterr().err == ""
    (path,) = folder.glob("hnsw-*.faiss")
    whole = path.read_bytes()
    flip(path, place)
    assert search(folder, vectors[:3], index="hnsw", progress=True) == found
    told = f"the index {path} is damaged or from an earlier version: rebuilding it\n"
    assert capsys.readouterr().err == told
    assert len(path.read_bytes()) == len(whole)
    assert search(folder, vectors[:3], index="hnsw", progress=True) == found
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("noted", ["3", '["a"]', '[["a"]]', '[["a", 5]]', "{", "null"])
def test_impossible_lists_of_corrupt_images(noted, folder):
    path = table.shard_path(folder, 0)
    rewrite(path, corrupt=noted)
    with pytest.raises(table.DamagedShardError, match="it has no list of corrupt images"):
        table.corrupt_in(path, table.metadata(folder))
