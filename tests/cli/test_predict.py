"""Answers for files of all kinds, with names, pictures and errors."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import backbones
from backbones.cli.common import CommandError, load, read_labels
from backbones.cli.main import main
from backbones.training.checkpoint import save_weights


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """As ``train_cls.py`` leaves it: weights and recipe of a model for three classes."""
    torch.manual_seed(0)
    model = backbones.create_model("shvit_s1", num_classes=3)
    save_weights(tmp_path / "best.safetensors", model.state_dict(), {"model": "shvit_s1"})
    recipe = {"model": "shvit_s1", "num_classes": 3, "img_size": 64, "data": "x", "crop_pct": 1.0}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(recipe))
    return tmp_path


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    pixels = np.random.RandomState(0).randint(0, 255, (4, 40, 50, 3)).astype(np.uint8)
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{number}.png")
    whole = (folder / "0.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    return folder


def test_a_folder_with_a_corrupt_file(
    run_folder: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run_folder / "names.txt").write_text("cat\ndog\nowl\n")
    checkpoint, out = str(run_folder / "best.safetensors"), run_folder
    words = ["predict", str(photos), "--checkpoint", checkpoint, "--batch-size", "3"]
    words += ["--labels", str(out / "names.txt"), "--csv", str(out / "a.csv")]
    words += ["--json", str(out / "a.json"), "--cam", str(out / "a.png")]
    assert main(words) == 1
    said = capsys.readouterr()
    assert "1 of 5 images could not be read" in said.err
    assert f"cannot read {photos / 'cut.png'}" in said.err
    assert {"cat", "dog", "owl"} < set(said.out.split())

    rows = list(csv.DictReader((out / "a.csv").read_text().splitlines()))
    assert len(rows) == 4 * 3 + 1
    first = [row for row in rows if row["image"].endswith("0.png")]
    assert sum(float(row["confidence"]) for row in first) == pytest.approx(1, abs=1e-5)
    entries = json.loads((out / "a.json").read_text())
    assert "error" in entries[-1]
    assert [a["name"] for a in entries[0]["answers"]] == [row["name"] for row in first]
    with Image.open(out / "a.png") as picture:
        width, height = picture.size
    assert width > 1000
    assert height > 200


def test_answers_are_the_models(run_folder: Path, photos: Path) -> None:
    from timm.data import create_transform

    from backbones.cli.predict import open_image, predict, preprocessing

    loaded = load(None, run_folder / "best.safetensors")
    assert loaded.name == "shvit_s1"
    assert loaded.model.num_classes == 3
    config = preprocessing(loaded)
    assert config["input_size"] == (3, 64, 64)
    (answer,) = predict(loaded, [photos / "1.png"])
    image = create_transform(**config)(open_image(photos / "1.png"))
    expected = loaded.model(image[None]).softmax(1)[0]
    assert answer.confidences == pytest.approx(sorted(expected.tolist(), reverse=True), abs=1e-6)


def test_the_count_of_classes_comes_from_any_checkpoint(tmp_path: Path) -> None:
    model = backbones.create_model("van_b0", num_classes=7)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "van.pth")
    loaded = load("van_b0", tmp_path / "van.pth")
    assert loaded.model.num_classes == 7
    assert not loaded.report.reinitialised
    torch.testing.assert_close(loaded.model.head.fc.weight, model.head.fc.weight)


def test_names_of_classes_in_the_checkpoint(tmp_path: Path) -> None:
    model = backbones.create_model("shvit_s1", num_classes=2)
    metadata = {"model": "shvit_s1", "classes": json.dumps(["no", "yes"])}
    save_weights(tmp_path / "best.safetensors", model.state_dict(), metadata)
    assert load(None, tmp_path / "best.safetensors").classes == ["no", "yes"]


def test_label_files(tmp_path: Path) -> None:
    (tmp_path / "l.json").write_text('{"0": ["n01", "cat"], "1": ["n02", "dog"]}')
    assert read_labels(tmp_path / "l.json", 2) == ["cat", "dog"]
    with pytest.raises(CommandError, match="names 2 classes, but the model has 3"):
        read_labels(tmp_path / "l.json", 3)
    (tmp_path / "l.json").write_text("{")
    with pytest.raises(CommandError, match="no JSON list"):
        read_labels(tmp_path / "l.json", 2)


def test_models_without_classes_are_refused(
    photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["predict", str(photos), "--model", "hat_s_x2"]) == 2
    assert "hat_s_x2 has no classifier" in capsys.readouterr().err
