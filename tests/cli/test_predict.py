"""``predict``: files of all kinds, class names, pictures, errors."""

from __future__ import annotations

import csv
import io
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from embedding_runs import tiny_checkpoint
from other_encodings import Stream
from PIL import Image
from safetensors.torch import load_file
from timm.data import create_transform

import backbones
from backbones.cli.common import read_labels
from backbones.cli.main import main
from backbones.cli.predict import predict
from backbones.common.files import save_weights
from backbones.core.loaded import load, preprocessing
from ops.cpu.gemm.int8 import not_faster_in_int8


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """As ``train_cls.py`` leaves it: weights and recipe of a model for three classes."""
    tiny_checkpoint(tmp_path, classes=3, img_size=64, crop_pct=1.0, model="shvit_s1.in1k")
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


def test_a_folder_with_a_corrupt_file(run_folder, photos, capsys):
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
    entries = json.loads((out / "a.json").read_text())["images"]
    assert "error" in entries[-1]
    assert [a["name"] for a in entries[0]["predictions"]] == [row["name"] for row in first]
    with Image.open(out / "a.png") as picture:
        width, height = picture.size
    assert width > 1000
    assert height > 200


def test_so_many_pictures_whatever_the_batches(run_folder, photos):
    """Of the first images that can be read, in all."""
    paths = [photos / f"{name}.png" for name in (0, "cut", 1, 2, 3)]
    found = list(predict(load(None, run_folder / "best.safetensors"), paths, 2, 2, pictures=3))
    assert [answer.heat is not None for answer in found] == [True, False, True, True, False]
    assert [len(answer.ranked) for answer in found] == [2, 0, 2, 2, 2]


def predicted(run_folder: Path, *words: str | Path) -> int:
    checkpoint = str(run_folder / "best.safetensors")
    return main(["predict", *map(str, words), "--checkpoint", checkpoint])


@pytest.mark.parametrize("dtype", ["float32", "int8", "auto"])
def test_the_dtype_of_the_computation(dtype, run_folder, photos, capsys):
    """Close to the unfused model; where the CPU does not multiply int8, an error says so."""
    words = ["predict", str(photos / "0.png"), "--checkpoint", f"{run_folder}/best.safetensors"]
    found = []
    for more in ([], ["--dtype", dtype]):
        out = run_folder / "predicted.json"
        status = main([*words, "--json", str(out), *more])
        reason = not_faster_in_int8(torch.device("cpu")) if "int8" in more else None
        if reason is not None:
            assert status == 2 and reason in capsys.readouterr().err
            return
        assert status == 0
        (entry,) = json.loads(out.read_text())["images"]
        found.append({c["class"]: c["confidence"] for c in entry["predictions"]})
    assert found[0] == pytest.approx(found[1], abs=0.05)
    assert dtype != "int8" or found[0] != found[1]


def test_unreadable_files_are_named_and_skipped(run_folder, photos, capsys):
    """A named pipe would be read for ever, for nobody writes to it."""
    os.mkfifo(photos / "pipe.png")
    (photos / "link.png").symlink_to("nowhere")
    (photos / "folder.png").mkdir()
    assert predicted(run_folder, photos) == 1
    said = capsys.readouterr()
    assert f"cannot read {photos / 'pipe.png'}: is a named pipe" in said.err
    assert f"cannot read {photos / 'link.png'}: is a broken link" in said.err
    assert "3 of 7 images could not be read" in said.err
    assert "folder.png" not in said.err
    assert predicted(run_folder, photos / "pipe.png") == 1
    assert "pipe.png: is a named pipe" in capsys.readouterr().err


def test_undecodable_names(run_folder, photos, monkeypatch):
    """On a system whose names of files are bytes; the output in cp1252 as on Windows."""
    for number, name in enumerate([b"\xff.png", "日.png".encode(), b"a\nb.png", b"$\\frac$.png"]):
        os.rename(photos / f"{number}.png", os.path.join(os.fsencode(photos), name))
    (run_folder / "names.txt").write_text("кот\n$\\frac$\n한국어\n", encoding="utf-8")
    stream = Stream("cp1252")
    monkeypatch.setattr(sys, "stdout", stream)
    out = {name: run_folder / f"a.{name}" for name in ("csv", "json", "cam.png")}
    words = [f"--{name.partition('.')[0]}={path}" for name, path in out.items()]
    assert predicted(run_folder, photos, f"--labels={run_folder / 'names.txt'}", *words) == 1
    said = stream.said().decode("cp1252").splitlines()
    assert len(said) == 2 + 4 * 3
    for name in ("\\udcff.png", "\\u65e5.png", "a\\nb.png", "$\\frac$.png"):
        assert any(f"/{name}" in line for line in said)
    rows = csv.DictReader(io.StringIO(out["csv"].read_text(encoding="utf-8")))
    assert len({row["image"] for row in rows}) == 5
    entries = json.loads(out["json"].read_text(encoding="utf-8"))["images"]
    assert {Path(entry["image"]).name for entry in entries} == {*os.listdir(photos)}
    assert out["cam.png"].is_file()


def test_every_format_is_found_and_others_are_named(run_folder, photos, tmp_path, capsys):
    count = len(list(photos.iterdir()))
    image = Image.open(photos / "0.png").convert("RGB")
    for ending in ("webp", "tif", "bmp", "gif"):
        image.save(photos / f"x.{ending}")
    for name in ("notes.txt", "a.heic", "b.svg", "Thumbs.db"):
        (photos / name).touch()
    (photos / "cut.png").unlink()
    assert predicted(run_folder, photos, "--json", tmp_path / "a.json") == 0
    assert len(json.loads((tmp_path / "a.json").read_text())["images"]) == count + 3
    told = "skipped 4 files without the ending of a known image format: "
    names = ", ".join(str(photos / name) for name in ("Thumbs.db", "a.heic", "b.svg"))
    assert capsys.readouterr().err == f"{told}{names}, …\n"


def test_devices_and_pipes_are_written_to(run_folder, photos, tmp_path):
    """``--json /dev/stdout`` must not put a file in the place of the device."""
    reading, writing = os.pipe()
    link = tmp_path / "out"
    link.symlink_to(f"/dev/fd/{writing}")
    assert predicted(run_folder, photos / "0.png", "--topk", "1", "--json", link) == 0
    os.close(writing)
    with open(reading) as pipe:
        (entry,) = json.load(pipe)["images"]
    assert len(entry["predictions"]) == 1
    assert link.is_symlink()


@pytest.mark.parametrize("kind", ["weights", "predictions"])
def test_non_finite(kind, run_folder, photos, capsys):
    """Weights, or predictions of finite ones: products of large ones overflow."""
    path, photo = run_folder / "best.safetensors", photos / "0.png"
    tensors = load_file(path)
    names = [n for n, t in tensors.items() if t.is_floating_point()]
    told = [names[0], "NaN or infinite"]
    if kind == "weights":
        tensors[names[0]].view(-1)[0] = np.nan
    else:
        for name in (name for name in names if name.startswith("head.")):
            tensors[name].fill_(3e38)
        told = [f"error: the model's output for {photo} is not finite"]
    save_weights(path, tensors, {"model": "shvit_s1"})
    out = ["--csv", run_folder / "a.csv", "--json", run_folder / "a.json"]
    for words in (out, [*out, "--cam", run_folder / "a.png"]):
        assert predicted(run_folder, photo, *words) == 2
        said = capsys.readouterr()
        (line,) = said.err.splitlines()
        assert all(text in line for text in told)
        assert said.out == "" and not [p for p in run_folder.iterdir() if p.name.startswith("a.")]


def test_the_list_of_classes_in_metadata(run_folder, photos, capsys):
    path = run_folder / "best.safetensors"
    tensors = load_file(path)
    for classes in ("{", '"abc"', "5", "[" * 10**4):
        save_weights(path, tensors, {"model": "shvit_s1", "classes": classes})
        assert predicted(run_folder, photos / "0.png") == 2
        assert "its metadata has no list of names" in capsys.readouterr().err
    save_weights(path, tensors, {"model": "shvit_s1", "classes": '["no", "yes", "?"]'})
    assert load(None, path).classes == ["no", "yes", "?"]


@pytest.mark.parametrize(("ending", "mode"), [("png", "RGB"), ("jpg", "RGB"), ("png", "L")])
def test_predictions_are_the_models(ending, mode, photos, tmp_path):
    """Of the pixels that Pillow and timm make of a file."""
    with Image.open(photos / "1.png") as image:
        image.save(tmp_path / f"1.{ending}")
    changes = {"img_size": 64, "crop_pct": 1.0, "in_chans": len(mode)}
    loaded = load(None, tiny_checkpoint(tmp_path / "run", classes=3, **changes))
    assert (loaded.name, loaded.model.num_classes) == ("shvit_s1", 3)
    config = preprocessing(loaded)
    assert config["input_size"] == (len(mode), 64, 64)
    (answer,) = predict(loaded, [tmp_path / f"1.{ending}"])
    with Image.open(tmp_path / f"1.{ending}") as image:
        pixels = create_transform(**config)(image.convert(mode))
    with torch.inference_mode():
        expected = loaded.model(pixels[None]).softmax(1)[0]
    assert [share for _, share in answer.ranked] == sorted(expected.tolist(), reverse=True)


def test_the_count_of_classes_comes_from_any_checkpoint(tmp_path):
    model = backbones.create_model("van_b0", num_classes=7)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "van.pth")
    loaded = load("van_b0", tmp_path / "van.pth")
    assert loaded.model.num_classes == 7
    assert not loaded.report.reinitialised
    torch.testing.assert_close(loaded.model.head.fc.weight, model.head.fc.weight)


def test_labels_of_imagenet(tmp_path):
    (tmp_path / "l.json").write_text('{"0": ["n01", "cat"], "1": ["n02", "dog"]}')
    assert read_labels(tmp_path / "l.json", 2) == ["cat", "dog"]


def test_too_narrow_to_be_resized(run_folder, tmp_path, capsys):
    Image.new("RGB", (60000, 1)).save(tmp_path / "a.png")
    assert predicted(run_folder, tmp_path / "a.png") == 1
    assert "60000×1 pixels is too narrow to be resized" in capsys.readouterr().err
