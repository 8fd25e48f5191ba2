"""Images that are not in a table are embedded like those in it."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from embedding_runs import Embedded, embed_images

from backbones.common.errors import MendableError
from backbones.embedding import table
from backbones.embedding.query import embed_queries


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Embedded:
    return embed_images(tmp_path_factory.mktemp("query"))


def test_queries_equal_the_table(embedded):
    keys, vectors = table.load(embedded.table)
    assert len(keys) == 19
    found = embed_queries(embedded.table, [embedded.images / key for key in keys])
    assert found.paths == [embedded.images / key for key in keys]
    np.testing.assert_allclose(found.vectors, vectors, rtol=1e-5, atol=1e-6)


def test_unreadable_images_are_named_and_skipped(embedded, tmp_path):
    (tmp_path / "no.png").write_text("no image")
    good = embedded.images / "val/class0/000.png"
    paths = [tmp_path / "no.png", good, tmp_path / "none.png"]
    found = embed_queries(embedded.table, paths)
    assert found.paths == [good] and found.vectors.shape == (1, 32)
    assert [path for path, _ in found.unreadable] == [paths[0], paths[2]]
    assert found.unreadable[1][1] == "does not exist"
    assert embed_queries(embedded.table, [tmp_path / "none.png"]).vectors.shape == (0, 32)


def test_the_weights_must_be_the_same(embedded, tmp_path):
    moved = shutil.copytree(embedded.checkpoint.parent, tmp_path / "moved")
    good = [embedded.images / "val/class0/000.png"]
    assert embed_queries(embedded.table, good, moved / "best.safetensors").vectors.shape == (1, 32)
    with open(moved / "best.safetensors", "ab") as file:
        file.write(b"\0")
    with pytest.raises(MendableError, match=r"is not the file that .*: its SHA-256 is "):
        embed_queries(embedded.table, good, moved / "best.safetensors")
    copy = shutil.copytree(embedded.table, tmp_path / "table")
    said = table.metadata(copy)
    said["weights"]["path"] = str(tmp_path / "gone.pth")
    table.write_metadata(copy, said)
    with pytest.raises(MendableError, match=r"gone.pth, cannot be read: it does not exist; pass"):
        embed_queries(copy, good)


def test_the_preprocessing_must_be_the_same(embedded, tmp_path):
    """For example, the recipe next to the weights was lost or changed."""
    moved = shutil.copytree(embedded.checkpoint.parent, tmp_path / "moved")
    recipe = moved / "config.yaml"
    recipe.write_text(recipe.read_text().replace("img_size: 32", "img_size: 64"))
    with pytest.raises(
        MendableError, match=r"other settings: preprocessing: input_size \[3, 32, 32\] th"
    ):
        embed_queries(embedded.table, [], moved / "best.safetensors")
