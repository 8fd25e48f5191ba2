"""Each field of ``metadata.json`` is checked once, where the file is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from embedding_runs import words
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
def test_impossible_fields(key, value, folder):
    edit(folder, key, value)
    with pytest.raises(table.TableError, match=r"metadata\.json is damaged: ") as raised:
        table.load(folder)
    said = str(raised.value)
    assert key.split(".")[0] in said and "\n" not in said and len(said) < 500


@pytest.mark.parametrize(
    "name", ["model", "weights", "preprocessing", "features", "shape", "dim", "dtype", "computed"]
)
def test_missing_fields(name, folder):
    path = folder / "metadata.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in content.items() if key != name}))
    with pytest.raises(table.TableError, match=f"lacks {name}"):
        table.load(folder)


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        *(("format", n, r"does not describe embeddings \(format 1\)") for n in (0, 2, "1", None)),
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


@pytest.mark.parametrize(
    ("key", "value"),
    [("images", None), ("shards", 0), ("decoder", "pillow"), ("names", ["a"]), ("versions", None)],
)
def test_possible_fields(key, value, folder):
    edit(folder, key, value)
    assert table.metadata(folder)[key] == value


def test_a_kind_of_source_that_is_unknown(folder):
    edit(folder, "source.kind", "zip")
    with pytest.raises(table.TableError, match="the kind of source must be one of folder, list"):
        image_bytes(folder, "00001.png", [folder])


def test_a_shape_that_the_model_does_not_make(photos, checkpoint, tmp_path):
    assert main(words(photos, tmp_path / "out", checkpoint)) == 0
    edit(tmp_path / "out", "shape", [2, 16])
    with pytest.raises(MendableError, match=r"of shape \[2, 16\], but its model returns \[32\]"):
        embed_queries(tmp_path / "out", [photos / "000.png"])
