"""How well embeddings separate classes, measured on held-out images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from embedding_tables import make_table
from sklearn.linear_model import LogisticRegression

from backbones.common.confusion import confusions
from backbones.common.errors import MendableError
from backbones.embedding.labels import LabelError
from backbones.embedding.probe import probe


def clouds(counts: list[int], noise: float, dim: int = 12) -> tuple[np.ndarray, list[str]]:
    """Embeddings around a centre for each class, and keys whose folders name the class."""
    generator = np.random.default_rng(0)
    classes = np.repeat(np.arange(len(counts)), counts)
    centres = np.random.default_rng(1).normal(size=(len(counts), dim))
    vectors = centres[classes] + noise * generator.normal(size=(len(classes), dim))
    keys = [f"class{label}/{i:04}.png" for i, label in enumerate(classes)]
    return vectors.astype(np.float32), keys


@pytest.fixture(scope="module")
def easy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_table(tmp_path_factory.mktemp("probe") / "easy", *clouds([40, 30, 30], 0.1))


@pytest.fixture(scope="module")
def hard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_table(tmp_path_factory.mktemp("probe") / "hard", *clouds([90, 60, 30], 1.5))


def test_separable_classes(easy):
    report = probe(easy, "folder")
    assert (report.rows, report.labelled, report.train, report.test) == (100, 100, 80, 20)
    assert report.classes == ["class0", "class1", "class2"]
    assert report.chance == pytest.approx(0.4)
    assert [method.name for method in report.methods] == ["5 nearest", "linear probe"]
    for method in report.methods:
        assert method.accuracy == method.high == method.per_class == 1
        assert method.low == pytest.approx(0.839, abs=1e-3)  # Wilson's interval for 20 of 20
        np.testing.assert_array_equal(method.confusion, np.diag([8, 6, 6]))
        assert not method.mistakes and not method.note


def test_confusable_classes(hard):
    report = probe(hard, "folder", seed=3)
    for method in report.methods:
        wrong = sum(count for _, _, count in confusions(method.confusion, report.classes))
        assert 0 < wrong == len(method.mistakes) == report.test - np.trace(method.confusion)
        assert method.accuracy == pytest.approx(1 - wrong / report.test)
        assert method.low < method.accuracy < method.high
        sizes = method.confusion.sum(axis=1)
        np.testing.assert_array_equal(sizes, [18, 12, 6])
        shares = np.diag(method.confusion) / sizes
        assert method.per_class == pytest.approx(shares.mean())
        for mistake in method.mistakes:
            assert mistake.key.startswith(f"{mistake.truth}/") and mistake.truth != mistake.answer
        sure = [mistake.confidence for mistake in method.mistakes]
        assert sure == sorted(sure, reverse=True) and 1 >= sure[0] > 1 / 3
    mistakes = [method.mistakes for method in report.methods]
    for seed, is_same in ((3, True), (4, False)):
        again = [method.mistakes for method in probe(hard, "folder", seed=seed).methods]
        assert (again == mistakes) is is_same


def test_neighbours_are_those_of_the_greatest_cosine(tmp_path):
    """The norm of an embedding is irrelevant; of two neighbours, the nearer has more weight."""
    vectors = np.array([[1, 0], [0, 100], [0.01, 0.002], [3, 100]], np.float32)
    table = make_table(tmp_path / "table", vectors, list("abcd"))
    labels = {"a": "right", "b": "up", "c": "right", "d": "up"}
    split = {"a": "train", "b": "train", "c": "test", "d": "test"}
    (nearest, _) = probe(table, labels, split=split, neighbors=2).methods
    assert nearest.accuracy == 1


def test_dimensions_of_any_scale_count_for_the_linear_probe(tmp_path):
    """And with hardly any of its weights allowed, it answers with the most frequent class."""
    vectors, keys = clouds([40, 20], 0.0, dim=2)
    vectors[:, 0] = 1e-3 * vectors[:, 0]
    vectors[:, 1] = np.random.default_rng(2).normal(size=60)
    table = make_table(tmp_path / "table", vectors, keys)
    (_, linear) = probe(table, "folder").methods
    np.testing.assert_array_equal(linear.confusion, np.diag([8, 4]))
    (_, linear) = probe(table, "folder", c=1e-6).methods
    np.testing.assert_array_equal(linear.confusion, [[8, 0], [4, 0]])


def test_a_second_table_to_measure_on(easy, tmp_path):
    vectors, keys = clouds([5, 5, 4], 0.1)
    keys = [f"val/{key}" for key in keys]
    other = make_table(tmp_path / "other", vectors, keys)
    report = probe(easy, "folder", test=other)
    assert (report.rows, report.train, report.test) == (114, 100, 14)
    assert [method.accuracy for method in report.methods] == [1, 1]
    labels = dict.fromkeys(keys[:3], "class1") | {keys[3]: "new"}
    report = probe(easy, "folder", test=other, test_labels=labels)
    assert (report.labelled, report.test) == (104, 3)
    assert report.notes == ["1 classes without training images were left out, such as new"]
    assert [method.accuracy for method in report.methods] == [0, 0]
    assert {mistake.folder for mistake in report.methods[0].mistakes} == {str(other)}
    weights = {"file": "x.pth", "sha256": "1" * 64}
    for key, value in (
        ("model", "van_b0"),
        ("weights", weights),
        ("features", "stage:1"),
        ("preprocessing", {"crop_pct": 1.0}),
    ):
        changed = make_table(tmp_path / key, vectors, keys, **{key: value})
        with pytest.raises(MendableError, match=f"cannot be compared: their {key} differ: "):
            probe(easy, "folder", test=changed)


def test_splits_of_the_user(tmp_path):
    vectors, keys = clouds([10, 10], 0.1)
    keys = [f"{'val' if i % 5 == 0 else 'train'}/{key}" for i, key in enumerate(keys)]
    table = make_table(tmp_path / "table", vectors, keys)
    report = probe(table, "folder", split="folder")
    assert (report.train, report.test) == (16, 4)
    split = {key: "test" if key.endswith("1.png") else "train" for key in keys[:15]}
    report = probe(table, "folder", split=split)
    assert (report.labelled, report.train, report.test) == (20, 13, 2)


def test_a_class_of_one_image_is_learned_from(tmp_path):
    table = make_table(tmp_path / "table", *clouds([10, 1, 2], 0.1))
    report = probe(table, "folder", neighbors=50)
    assert (report.train, report.test) == (10, 3)
    np.testing.assert_array_equal(report.methods[0].confusion.sum(axis=1), [2, 0, 1])
    assert report.methods[0].note == "there are only 10 training images"


def test_rows_are_bounded_and_rare_classes_stay(tmp_path):
    report = probe(make_table(tmp_path / "table", *clouds([100, 2], 0.1)), "folder", most_rows=20)
    assert (report.train, report.test, report.classes) == (20, 20, ["class0", "class1"])
    assert report.notes == [
        "20 of 81 images to train on were chosen at random",
        "20 of 21 images to test on were chosen at random",
    ]
    for method in report.methods:
        np.testing.assert_array_equal(method.confusion, np.diag([19, 1]))


def test_chance_is_that_of_the_class_most_frequent_in_training(tmp_path):
    """Classes in numbers are in their order."""
    vectors, keys = clouds([7, 6], 0.1)
    labels = dict(zip(keys, ["10"] * 7 + ["9"] * 6, strict=True))
    split = dict(zip(keys, ["train"] * 6 + ["test"] + ["train"] * 2 + ["test"] * 4, strict=True))
    report = probe(make_table(tmp_path / "table", vectors, keys), labels, split=split)
    assert (report.train, report.test, report.chance) == (8, 5, 1 / 5)
    assert report.classes == ["9", "10"]


def test_bad_input(easy, tmp_path, monkeypatch):
    for options, said in (
        ({"held_out": 1.0}, "held_out must be between 0 and 1, got 1.0"),
        ({"neighbors": 0}, "neighbors must be at least 1, got 0"),
        ({"c": 0.0}, "c must be above 0, got 0.0"),
        ({"most_rows": 1}, "most_rows must be at least 2, got 1"),
        ({"test": easy, "split": "folder"}, "give either test or split"),
    ):
        with pytest.raises(ValueError, match=said):
            probe(easy, "folder", **options)  # type: ignore[arg-type]
    one, other = "class0/0000.png", "class0/0001.png"
    broken = np.full((4, 2), np.nan, np.float32)
    table = make_table(tmp_path / "table", broken, [f"{c}/{i}" for i, c in enumerate("aabb")])
    for folder, labels, said in (
        (easy, {one: "a", other: "a"}, "at least two classes"),
        (easy, {one: "a", other: "b"}, "no image of a known class is held out"),
        (table, "folder", "embeddings that are NaN or infinite"),
    ):
        with pytest.raises(LabelError, match=said):
            probe(folder, labels)
    made = LogisticRegression.__init__
    once = lambda self, **options: made(self, **{**options, "max_iter": 1})  # noqa: E731
    monkeypatch.setattr(LogisticRegression, "__init__", once)
    assert "had not converged" in probe(easy, "folder").methods[1].note
