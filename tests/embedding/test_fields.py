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
