"""Confusion matrices: figures of each class, the most frequent mistakes, pictures of any size."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from backbones.common.confusion import class_report, confusion_matrix, confusions, draw_confusions


def test_matrix_and_report_by_hand():
    matrix = confusion_matrix(np.array([0, 0, 0, 1, 1, 1]), np.array([0, 1, 1, 1, 1, 2]), 3)
    assert matrix.tolist() == [[1, 2, 0], [0, 2, 1], [0, 0, 0]]
    classes = ["cat", "dog", "fox"]
    assert confusions(matrix, classes) == [("cat", "dog", 2), ("dog", "fox", 1)]
    first, second, third = class_report(matrix, classes)
    assert (first["recall"], first["precision"], first["f1"]) == (33.33, 100.0, 50.0)
    assert (first["taken_for"], first["taken_for_images"]) == ("dog", 2)
    assert (second["recall"], second["precision"], second["taken_for"]) == (66.67, 50.0, "fox")
    assert (third["images"], third["recall"], third["taken_for"]) == (0, "", "")


@pytest.mark.parametrize("count", [3, 16, 60])
def test_the_picture_of_few_and_of_many_classes(count, tmp_path):
    truth, answers = np.random.default_rng(0).integers(0, count, (2, 500))
    names = [f"a $name$ of some length\n{i}" for i in range(count)]
    answered = {"right": truth, "wrong": answers}
    matrices = {name: confusion_matrix(truth, found, count) for name, found in answered.items()}
    draw_confusions(tmp_path / "a.png", "title", names, matrices)
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size[0] > 1300 and picture.size[1] > 800
