"""Reading a table reports shards that are missing, damaged or from another table."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from embedding_runs import words
from embedding_tables import make_table, rewrite
from fuzzing import damage, fuzz
from hypothesis import given

from backbones.cli.main import main
from backbones.common.errors import MendableError
from backbones.embedding import table
from backbones.embedding.query import embed_queries
from backbones.embedding.sources import image_bytes
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


# -- fields of metadata.json, which are checked once, where it is read -----------------------------


def edit(folder: Path, key: str, value: Any) -> None:
    """Change a field, also one within another: ``source.kind``."""
    path = folder / "metadata.json"
    content = json.loads(path.read_text())
    inner, *names = content, *key.split(".")
    for name in names[:-1]:
        inner = inner[name]
    inner[names[-1]] = value
    path.write_text(json.dumps(content))


JUNK = [None, True, -1, 0, 1.5, float("nan"), 10**20, "x", "a\0b", "\ud800", [], ["x"], [-4], {}]
# Each field, with what of that it may be.
FIELDS: dict[str, list[Any]] = {
    **dict.fromkeys(("dim", "rows", "shape", "dtype", "computed", "weights", "source"), []),
    **dict.fromkeys(("model", "features", "weights.file", "weights.sha256"), ["x", "a\0b"]),
    **{"weights.path": [None, "x"], "source.path": ["x"], "source.kind": ["x", "a\0b"]},
    **{"images": [None, 0], "shards": [0], "classes": [0], "names": [None, [], ["x"]]},
    **{"decoder": [None], "seal": [None, "x", "a\0b"], "preprocessing": [{}]},
}


@pytest.mark.parametrize("key", FIELDS)
def test_possible_and_impossible_fields(key, folder):
    for value in JUNK:
        edit(folder, key, value)
        if repr(value) in map(repr, FIELDS[key]):
            table.metadata(folder)
            continue
        with pytest.raises(table.TableError, match=r"metadata\.json is damaged: ") as raised:
            table.load(folder)
        said = str(raised.value)
        assert key.split(".")[0] in said and "\n" not in said and len(said) < 500


@pytest.mark.parametrize("kind", ["parquet", "training"])
def test_kinds_of_sources_that_need_more(kind, folder):
    edit(folder, "source.kind", kind)
    with pytest.raises(table.TableError, match=r"damaged: source\.(column|data) is missing"):
        table.metadata(folder)


def test_missing_fields(folder):
    path = folder / "metadata.json"
    content = json.loads(path.read_text())
    for name in ("model", "weights", "preprocessing", "shape", "dim", "dtype", "computed"):
        path.write_text(json.dumps({key: value for key, value in content.items() if key != name}))
        with pytest.raises(table.TableError, match=f"lacks {name}"):
            table.load(folder)


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        *(("format", n, f"has format {n!r}, this version reads 1: use") for n in (0, 2, "1", None)),
        ("dim", 5, r"dim must be the product of shape, \[4\], not 5"),
    ],
)
def test_other_formats(key, value, told, folder):
    edit(folder, key, value)
    with pytest.raises(table.TableError, match=told):
        table.metadata(folder)


def test_a_dim_that_the_shards_do_not_have(folder):
    """It is compared before as much memory is taken."""
    content = table.metadata(folder)
    table.write_metadata(folder, {**content, "dim": 2**31 - 1, "shape": [2**31 - 1]})
    with pytest.raises(table.TableError, match="belongs to other embeddings"):
        table.count_rows(folder)
    with pytest.raises(table.TableError, match="belongs to other embeddings"):
        table.load(folder)


@pytest.mark.parametrize("shards", [3, 10**18])
def test_missing_shards(shards, folder):
    """At once, however many are missing; the first of them is named."""
    edit(folder, "shards", shards)
    told = f"{shards - 2} of {shards} shards are missing .part-00002.parquet"
    with pytest.raises(table.TableError, match=told):
        table.load(folder)
    edit(folder, "shards", 2)
    table.shard_path(folder, 0).unlink()
    with pytest.raises(table.TableError, match=r"1 of 2 shards .*part-00000\.parquet"):
        table.shard_paths(folder)


def test_a_kind_of_source_that_is_unknown(folder):
    edit(folder, "source.kind", "zip")
    with pytest.raises(table.TableError, match="the kind of source must be one of folder, list"):
        image_bytes(folder, "00001.png", [folder])


def test_a_shape_that_the_model_does_not_make(photos, checkpoint, tmp_path):
    assert main(words(photos, tmp_path / "out", checkpoint)) == 0
    edit(tmp_path / "out", "shape", [2, 16])
    with pytest.raises(MendableError, match=r"shape: \[2, 16\] there, \[32\] now"):
        embed_queries(tmp_path / "out", [photos / "000.png"])


# -- any metadata and any shards: a table that loads, or an error in a line that changes nothing ---


EXAMPLES = 100


@pytest.fixture
def thirds(tmp_path: Path) -> Path:
    keys = [f"{'ab'[row % 2]}/{row}.png" for row in range(9)]
    return make_table(tmp_path / "table", np.eye(9, dtype=np.float32), keys, rows=3)


def loads(thirds: Path) -> bool:
    """Whether a table loads; the reason is a line."""
    try:
        table.load(thirds)
    except (table.TableError, FileNotFoundError) as error:
        assert "\n" not in str(error) and len(str(error)) < 1000
        return False
    return True


@pytest.mark.parametrize("signed", [True, False])
def test_any_shard(signed, thirds):
    """Without a checksum, as of an earlier version, only Arrow and the checks of rows notice."""
    path, seen = table.shard_path(thirds, 1), list[bool]()
    wanted = table.load(thirds)
    if not signed:
        rewrite(path)
    data = path.read_bytes()

    @fuzz(EXAMPLES)
    @given(damage())
    def one(change: Callable[[bytes], bytes]) -> None:
        path.write_bytes(change(data))
        seen.append(loads(thirds))
        if signed and seen[-1]:  # nothing that counts has changed
            keys, vectors = table.load(thirds)
            assert keys == wanted[0] and np.array_equal(vectors, wanted[1])

    one()
    assert seen.count(False) > EXAMPLES // 4


SPOILT: dict[str, Callable[[Path], object]] = {
    "cut": lambda path: path.write_bytes(b"PAR1 and no more"),
    "pipe": os.mkfifo,
    "folder": Path.mkdir,
    "loop": lambda path: path.symlink_to(path.name),
    "device": lambda path: path.symlink_to("/dev/zero"),
    "gone": lambda path: None,
}
COMMANDS = [
    *("search --key a/0.png", "search --key a/0.png --index hnsw", "search --query a.png"),
    *("duplicates", "probe --labels folder"),
]


@pytest.mark.parametrize("name", ["metadata.json", "shards/part-00001.parquet"])
@pytest.mark.parametrize("kind", SPOILT)
def test_commands_say_it_in_a_line(kind, name, thirds, capsys, monkeypatch):
    monkeypatch.chdir(thirds.parent)
    Path("a.png").write_bytes(b"no image")
    (thirds / name).unlink()
    SPOILT[kind](thirds / name)
    before = set(thirds.rglob("*"))
    for command, *more in map(str.split, COMMANDS):
        assert main([command, str(thirds), *more]) == 2
        said = capsys.readouterr()
        assert said.out == "" and said.err.startswith("error: ") and said.err.count("\n") == 1
    assert set(thirds.rglob("*")) == before
