"""Classes of images from files in several formats, from folders, and from the source."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from embedding_tables import make_table

from backbones.data.splits import open_splits
from backbones.embedding.labels import LabelError, labels_of, read_assignments, split_of
from backbones.embedding.sources import open_source
from backbones.training.recipe import Recipe

KEYS = ["train/cat/0.png", "train/dog/1.png", "val/cat/2.png", "3.png"]


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("labels") / "table"
    return make_table(folder, np.eye(4, dtype=np.float32), KEYS, rows=3)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", "x/0.png,cat\ny.png,7\n"),
        ("a.csv", "\ufeffkey,label\nx/0.png,cat\n\ny.png,7\n"),
        ("a.csv", "class,width,path\r\ncat,5,x/0.png\r\n7,6,y.png\r\n"),
        ("a.csv", "file,width,label\nx/0.png,5,cat\ny.png,6,7\n"),
        ("a.csv", '"x/0.png", cat\ny.png,7\n'),
        ("a.tsv", "file\tnumber\nx/0.png\tcat\ny.png\t7\n"),
        ("a.txt", "x/0.png\tcat\ny.png\t7\n"),
        ("a.json", '{"x/0.png": "cat", "y.png": 7}'),
        ("a.json", '[["x/0.png", "cat"], ["y.png", 7]]'),
        ("a.json", '[{"key": "x/0.png", "label": "cat"}, {"key": "y.png", "label": 7}]'),
    ],
)
def test_files_of_labels(name, text, tmp_path):
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert read_assignments(tmp_path / name) == {"x/0.png": "cat", "y.png": "7"}


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.csv", "", "has no labels"),
        ("a.csv", "x.png\n", "a row must be a key and a label, separated"),
        ("a.csv", "x,cat\nx,dog\n", "gives 'x' two labels, 'cat' and 'dog'"),
        ("a.json", "[1]", "must be JSON with labels by key"),
        ("a.json", '"x"', "must be JSON with labels by key"),
        ("a.json", "5", "must be JSON with labels by key"),
        ("a.json", '{"x": [1]}', "must be JSON with labels by key"),
        ("a.json", "[" * 100_000, "must be JSON with labels by key"),
    ],
)
def test_invalid_label_files(name, text, said, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(LabelError, match=said):
        read_assignments(tmp_path / name)


def test_labels_of_rows(table, tmp_path):
    assert labels_of(table, "folder") == ["cat", "dog", "cat", None]
    assert labels_of(table, {"3.png": "owl", "other": "x"}) == [None, None, None, "owl"]
    (tmp_path / "a.csv").write_text("train/dog/1.png,pet\n")
    assert labels_of(table, tmp_path / "a.csv") == [None, "pet", None, None]
    with pytest.raises(LabelError, match=r"come from a folder, which has no classes"):
        labels_of(table, "source")
    with pytest.raises(LabelError, match=r"keys is in .*, whose keys look like 'train/cat/0.png'"):
        labels_of(table, {"no": "cat"})
    with pytest.raises(LabelError, match=r"cannot read .*none.csv: No such file"):
        labels_of(table, tmp_path / "none.csv")
    flat = make_table(tmp_path / "flat", np.eye(2, dtype=np.float32))
    with pytest.raises(LabelError, match=r"no image of .* is in a class folder"):
        labels_of(flat, "folder")


def test_labels_of_the_source(tmp_path):
    """Labels of scikit-learn's digits, in the order of the training split."""
    images = open_splits(Recipe(data="digits")).validation
    source = open_source("digits", split="validation").description
    keys = [images.name(i) for i in (0, 7, 3)]
    table = make_table(tmp_path / "table", np.eye(3, dtype=np.float32), keys, source=source)
    assert labels_of(table, "source") == [str(images.labels[i]) for i in (0, 7, 3)]


def test_splits(table, tmp_path):
    assert split_of(table, "folder") == ["train", "train", "test", None]
    given = {KEYS[0]: "validation", KEYS[3]: "training"}
    assert split_of(table, given) == ["test", None, None, "train"]
    with pytest.raises(LabelError, match=r"a split is train, training, test, .*, not 'dev'"):
        split_of(table, {KEYS[0]: "dev"})
    other = make_table(tmp_path / "table", np.eye(2, dtype=np.float32), ["a/0.png", "b/0.png"])
    with pytest.raises(LabelError, match="is in a folder named train, test or val"):
        split_of(other, "folder")
