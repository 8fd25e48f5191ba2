"""Each field of ``metadata.json`` is checked once, where the file is read."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from embedding_runs import make_photos, tiny_checkpoint, words
from embedding_tables import make_table

from backbones.cli.main import main
from backbones.common.errors import MendableError
from backbones.embedding import table
from backbones.embedding.query import embed_queries
from backbones.embedding.sources import image_bytes


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_table(tmp_path / "table", np.eye(4, dtype=np.float32), rows=2)


def edit(folder: Path, key: str, value: Any) -> None:
    """Change a field, also one within another: ``source.kind``."""
    path = folder / "metadata.json"
    content = json.loads(path.read_text())
    inner, *names = content, *key.split(".")
    for name in names[:-1]:
        inner = inner[name]
    inner[names[-1]] = value
    path.write_text(json.dumps(content))


NO_COUNTS = [-1, 1.5, "320", None, True, [4], 1e12, float("nan")]
IMPOSSIBLE = [
    *(("dim", value) for value in (*NO_COUNTS, 0, 10**12)),
    *(("rows", value) for value in (*NO_COUNTS, 0)),
    *(("shards", value) for value in NO_COUNTS),
    *(("images", value) for value in NO_COUNTS if value is not None),
    *(("classes", value) for value in (*NO_COUNTS, 10**12)),
    *(("shape", value) for value in (None, 4, [], [0], [-4], ["4"], [2.0, 2])),
    *(("dtype", value) for value in (None, "float64", 16, ["float32"])),
    *(("computed", value) for value in (None, "int4", 8)),
    *(("model", value) for value in (None, 5, ["van_b0"])),
    *(("features", value) for value in (None, 5)),
    *(("preprocessing", value) for value in (None, [], "timm")),
    *(("weights", value) for value in (None, "a.pth", [], {}, {"file": "a.pth"})),
    *(("weights.sha256", 5), ("weights.file", None), ("weights.path", 7), ("weights.path", "a\0")),
    *(("names", value) for value in (5, [5], {"a": 1})),
    *(("decoder", value) for value in (5, "turbo")),
    *(("source", value) for value in (None, "photos", [], {}, {"kind": "folder"})),
    *(
        ("source.kind", 5),
        ("source.path", None),
        ("source.path", "a\0b"),
        ("source.path", "\ud800"),
    ),
    *(("source.kind", "parquet"), ("source.kind", "training"), ("seal", 5)),
]


@pytest.mark.parametrize(("key", "value"), IMPOSSIBLE, ids=str)
def test_impossible_fields(key: str, value: Any, folder: Path) -> None:
    edit(folder, key, value)
    with pytest.raises(table.TableError, match=r"metadata\.json is damaged: ") as raised:
        table.load(folder)
    said = str(raised.value)
    assert key.split(".")[0] in said and "\n" not in said and len(said) < 500


@pytest.mark.parametrize("command", ["search", "duplicates", "probe"])
def test_commands_say_so_in_a_line(
    command: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(folder, "dim", 0)
    more = {"search": ["--key", "00001.png"], "duplicates": [], "probe": ["--labels", "folder"]}
    assert main([command, str(folder), *more[command]]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {folder / 'metadata.json'} is damaged: dim must be ")
    assert said.endswith(" got 0\n") and said.count("\n") == 1


def test_shape_and_dim_agree(folder: Path) -> None:
    edit(folder, "dim", 5)
    with pytest.raises(table.TableError, match=r"dim must be the product of shape, \[4\], not 5"):
        table.metadata(folder)


def test_a_dim_that_the_shards_do_not_have(folder: Path) -> None:
    """It is compared before as much memory is taken."""
    content = table.metadata(folder)
    table.write_metadata(folder, {**content, "dim": 2**31 - 1, "shape": [2**31 - 1]})
    with pytest.raises(table.TableError, match="belongs to other embeddings"):
        table.count_rows(folder)
    with pytest.raises(table.TableError, match="belongs to other embeddings"):
        table.load(folder)


@pytest.mark.parametrize("shards", [3, 10**9, 10**18])
def test_many_missing_shards(shards: int, folder: Path) -> None:
    edit(folder, "shards", shards)
    begun = time.process_time()
    told = f"{shards - 2} of {shards} shards are missing .part-00002.parquet"
    with pytest.raises(table.TableError, match=told):
        table.load(folder)
    assert time.process_time() - begun < 1


def test_the_first_missing_shard_is_named(folder: Path) -> None:
    table.shard_path(folder, 0).unlink()
    with pytest.raises(table.TableError, match=r"1 of 2 shards .*part-00000\.parquet"):
        table.shard_paths(folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [("images", None), ("shards", 0), ("decoder", "pillow"), ("names", ["a"]), ("versions", None)],
)
def test_possible_fields(key: str, value: Any, folder: Path) -> None:
    edit(folder, key, value)
    assert table.metadata(folder)[key] == value


def test_fields_of_earlier_versions_suffice(folder: Path) -> None:
    """The first one wrote no path of the weights, and no decoder."""
    path = folder / "metadata.json"
    content = json.loads(path.read_text())
    del content["weights"]["path"], content["names"], content["versions"]
    path.write_text(json.dumps(content))
    assert len(table.load(folder)[0]) == 4


def test_a_kind_of_source_that_is_unknown(folder: Path) -> None:
    edit(folder, "source.kind", "zip")
    with pytest.raises(table.TableError, match="the kind of source must be one of folder, list"):
        image_bytes(folder, "00001.png", [folder])


def test_a_shape_that_the_model_does_not_make(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "model")
    photos = make_photos(tmp_path / "photos", 2)
    assert main(words(photos, tmp_path / "out", checkpoint)) == 0
    edit(tmp_path / "out", "shape", [2, 16])
    with pytest.raises(MendableError, match=r"of shape \[2, 16\], but its model returns \[32\]"):
        embed_queries(tmp_path / "out", [photos / "000.png"])
