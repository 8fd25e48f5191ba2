"""Commands with models of timm: they compute what timm does."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.data import create_transform, resolve_data_config
from training_runs import make_images, train

import backbones
from backbones.cli.main import main
from backbones.common.tables import count_text
from backbones.core.loaded import load
from backbones.embedding import table
from ops.cpu import policy
from ops.cpu.gemm.int8 import not_faster_in_int8

_REASON = not_faster_in_int8(torch.device("cpu"))
needs_int8 = pytest.mark.skipif(_REASON is not None, reason=f"{_REASON}")
TINY = ("test_vit", "test_resnet", "test_convnext")


def run(*words: str | Path) -> int:
    return main(list(map(str, words)))


def refusal(capsys: pytest.CaptureFixture[str], *words: str | Path) -> str:
    """What a command says that cannot do it."""
    capsys.readouterr()
    assert run(*words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


def weights(name: str, folder: Path, **arguments: Any) -> tuple[torch.nn.Module, Path]:
    """A model of timm with its file."""
    torch.manual_seed(0)
    model = timm.create_model(name, **arguments).eval()
    save_file(model.state_dict(), folder / f"{name}.safetensors")
    return model, folder / f"{name}.safetensors"


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("timm") / "photos"
    folder.mkdir()
    pixels = np.random.RandomState(0).randint(0, 255, (4, 180, 210, 3)).astype(np.uint8)
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{number}.png")
    return folder


def batch_of(model: torch.nn.Module, photos: Path) -> torch.Tensor:
    """The photographs as timm prepares them."""
    transform = create_transform(**resolve_data_config(model.pretrained_cfg))
    images = [Image.open(path).convert("RGB") for path in sorted(photos.iterdir())]
    return torch.stack([transform(image) for image in images])


def assert_predictions(
    expected: torch.Tensor, allowed: float, photos: Path, folder: Path, *words: str | Path
) -> None:
    """``predict`` gives these confidences (images, classes)."""
    out = folder / "predicted.json"
    assert run("predict", photos, *words, "--topk=7", "--json", out) == 0
    for entry, row in zip(json.loads(out.read_text())["images"], expected, strict=True):
        for found in entry["predictions"]:
            assert found["confidence"] == pytest.approx(row[found["class"]].item(), abs=allowed)


@pytest.mark.parametrize("name", TINY)
def test_predict(name, photos, tmp_path):
    model, file = weights(name, tmp_path, num_classes=7)
    with torch.inference_mode():
        expected = model(batch_of(model, photos)).softmax(1)
    words = ["--model", f"timm/{name}", "--checkpoint", file, "--dtype=float32"]
    assert_predictions(expected, 1e-5, photos, tmp_path, *words)


def test_pretrained(photos, tmp_path, monkeypatch, capsys):
    """timm is asked for the weights that it publishes."""
    asked = []
    create = timm.create_model

    def offline(name: str, pretrained: bool, **arguments: Any) -> torch.nn.Module:
        asked.append((name, pretrained))
        return create(name, **arguments)

    monkeypatch.setattr(timm, "create_model", offline)
    name = "test_resnet.r160_in1k"
    assert run("predict", photos, "--model", f"timm/{name}", "--pretrained") == 0
    assert "untrained" not in capsys.readouterr().err
    assert run("export", f"timm/{name}", "--pretrained", "--out", tmp_path / "a.pt2") == 0
    assert asked == [(name, True)] * 2
    words = ["--model", f"timm/{name}", "--checkpoint", photos / "0.png", "--pretrained"]
    assert "both name weights" in refusal(capsys, "predict", photos, *words)
    words = ["--model", "timm/test_resnet.nonsense", "--pretrained"]
    assert "unknown tag of test_resnet 'nonsense'" in refusal(capsys, "predict", photos, *words)


def test_predict_refuses(photos, tmp_path, capsys):
    _, file = weights("test_resnet", tmp_path)
    words = ["predict", photos, "--model", "timm/test_resnet", "--checkpoint", file]
    cam = ["--cam", tmp_path / "a.png"]
    assert "--cam needs a model of this library" in refusal(capsys, *words, *cam)
    assert "unknown model 'timm/test_resnot'; did you mean 'timm/test_resnet'" in refusal(
        capsys, *words[:2], "--model", "timm/test_resnot"
    )
    said = refusal(capsys, *words[:2], "--model=timm/test_convnext", "--checkpoint", file)
    assert f"{file} does not fit ConvNeXt" in said and "missing" in said


@pytest.mark.parametrize("name", TINY)
def test_embed_and_search(name, photos, tmp_path):
    model, file = weights(name, tmp_path)
    folder = tmp_path / "table"
    words = ["embed", photos, "--model", f"timm/{name}", "--checkpoint", file, "--workers=1"]
    assert run(*words, "--out", folder) == 0
    with torch.inference_mode():
        images = batch_of(model, photos)
        expected = model.forward_head(model.forward_features(images), pre_logits=True)
    keys, vectors = table.load(folder)
    assert keys == [f"{number}.png" for number in range(4)]
    assert np.abs(vectors - expected.numpy()).max() < 1e-4 * expected.abs().max()
    out = ["--out", tmp_path / "a.png", "--json", tmp_path / "a.json"]
    assert run("search", folder, "--query", photos / "2.png", *out) == 0
    (entry,) = json.loads((tmp_path / "a.json").read_text())["queries"]
    assert entry["matches"][0]["key"] == "2.png" and entry["matches"][0]["score"] > 0.999


def test_embed_maps_and_classes(photos, tmp_path):
    model, file = weights("test_resnet", tmp_path)
    words = ["embed", photos, "--model=timm/test_resnet", "--checkpoint", file, "--workers=1"]
    assert run(*words, "--features=stage:2", "--classes=3", "--out", tmp_path / "a") == 0
    with torch.inference_mode():
        images = batch_of(model, photos)
        maps = model.forward_intermediates(images, [2], intermediates_only=True)
        expected = maps[0].mean((2, 3))
        best = model(images).topk(3).indices
    _, vectors = table.load(tmp_path / "a")
    assert np.abs(vectors - expected.numpy()).max() < 1e-4 * expected.abs().max()
    rows = [r for batch in table.batches(tmp_path / "a", ["classes"]) for r in batch.column(0)]
    assert [row.as_py() for row in rows] == best.tolist()


@pytest.mark.parametrize("name", TINY)
def test_summary(name, capsys, tmp_path):
    model = timm.create_model(name)
    for more in ([], ["--fused"]):
        assert run("summary", f"timm/{name}", "--runs=1", *more) == 0
        said = capsys.readouterr().out
        assert f"timm/{name}, one image of 160×160." in said
        (total,) = [line for line in said.splitlines() if line.startswith("total")]
        assert count_text(sum(p.numel() for p in model.parameters())) in total
    assert run("summary", f"timm/{name}", "--kernels", "--runs=1", "--size=96") == 0
    assert "fused: 1×3×96×96 float32" in capsys.readouterr().out
    if name == "test_vit":  # which takes images of one size
        said = refusal(capsys, "summary", "timm/test_vit", "--size", "97", "96")
        assert "--size 97 96: VisionTransformer does not accept images of 97×96: " in said
        words = ["export", "timm/test_vit", "--out", tmp_path / "a.pt2"]
        assert "VisionTransformer does not accept images of" in refusal(capsys, *words, "--dynamic")


def test_export(tmp_path, capsys):
    """The command compares the file with the model."""
    _, file = weights("test_vit", tmp_path)
    words = ["export", "timm/test_vit", "--checkpoint", file]
    assert run(*words, "--out", tmp_path / "a.onnx") == 0
    facts = {p.key: p.value for p in onnx.load(tmp_path / "a.onnx").metadata_props}
    assert json.loads(facts["preprocessing"])["input_size"] == [3, 160, 160]
    said = refusal(capsys, *words, "--fused", "--out=a.onnx")
    assert "--fused needs a model of this library" in said


@needs_int8
def test_int8(photos, tmp_path, capsys, monkeypatch):
    """A file of ``export --int8`` predicts what the model in int8 does, and so do options."""
    for name in ("_FEWEST_IN_INT8", "_FEWEST_IN_INT8_OF_TILES"):
        monkeypatch.setattr(policy, name, 1)
    model, file = weights("test_convnext", tmp_path, num_classes=7)
    words, path = ["timm/test_convnext", "--checkpoint", file], tmp_path / "int8.safetensors"
    options = ["--calibration", photos, "--max-drop=0.5", "--out", path]
    assert run("export", *words, "--int8", *options) == 0
    assert "layers in int8 (calibrated ranges)" in capsys.readouterr().out
    assert path.stat().st_size < file.stat().st_size / 2
    loaded = load(None, path)
    assert loaded.name == "timm/test_convnext" and loaded.model.precision.calibrated
    with torch.inference_mode():
        images = batch_of(model, photos)
        expected = model(images).softmax(1)
        vectors = model.forward_head(model.forward_features(images), pre_logits=True).numpy()
    for number, given in enumerate([[path], [file, "--dtype=int8"]]):
        given = ["--model=timm/test_convnext", "--checkpoint", *given]
        assert_predictions(expected, 0.02, photos, tmp_path, *given)
        folder = tmp_path / f"table{number}"
        assert run("embed", photos, *given, "--workers=1", "--out", folder) == 0
        _, found = table.load(folder)
        assert 1e-4 < np.linalg.norm(found - vectors) / np.linalg.norm(vectors) < 0.05
    capsys.readouterr()
    assert run("summary", "timm/test_convnext", "--kernels", "--runs=1", "--dtype=int8") == 0
    said = capsys.readouterr().out
    assert re.search(r"packed_mlp .* int8 ", said)
    assert "layers in int8 (a range for each row of inputs)" in said


def test_benchmark(tmp_path):
    words = ["benchmark", "--models", "timm/test_resnet", "--batches=1", "--against"]
    short = ["--rounds=1", "--turn-ms=1", "--output", tmp_path / "a"]
    assert run(*words, *short) == 0
    (row,) = json.loads((tmp_path / "a.json").read_text())["results"]
    assert (row["model"], row["size"]) == ("timm/test_resnet", 160)
    assert row["contenders"]["fused"]["difference_from_eager"] < 1e-5


def test_train_validate_and_predict(tmp_path, capsys):
    images = make_images(tmp_path / "images", {"train": 12, "val": 6})
    words = [f"--data={images}", f"--output={tmp_path}", "--model=timm/test_resnet", "--epochs=1"]
    assert train(*words, "--model-args={}", "--name=run") == 0
    capsys.readouterr()
    teacher = ["--distill=ofa", "--teacher=shvit_s1", "--teacher-pretrained=true"]
    assert train(*words, "--model-args={}", "--name=ofa", *teacher) == 2
    assert "ofa needs a student of this library, not ResNet" in capsys.readouterr().err
    words = ["validate", "--data", images, "--run", tmp_path / "run", "--output"]
    for more in ([], ["--fuse"]):
        assert run(*words, tmp_path / "a.csv", "--workers=0", "--device=cpu", *more) == 0
        (row,) = csv.DictReader((tmp_path / "a.csv").read_text().splitlines())
        assert (row["model"], row["img_size"], row["images"]) == ("timm/test_resnet", "32", "6")
    best = tmp_path / "run" / "best.safetensors"
    assert run("predict", images / "val", "--checkpoint", best, "--csv", tmp_path / "b.csv") == 0
    names = {row["name"] for row in csv.DictReader((tmp_path / "b.csv").read_text().splitlines())}
    assert names == {path.name for path in (images / "val").iterdir()}


def test_load_checkpoint(tmp_path):
    model, file = weights("test_convnext", tmp_path)
    other = timm.create_model("test_convnext").eval()
    report = backbones.load_checkpoint(other, file)
    assert not report.missing and not report.unexpected
    images = torch.randn(1, 3, 160, 160)
    assert torch.equal(model(images), other(images))
    tensors = model.state_dict()
    del tensors[next(iter(tensors))]
    with pytest.raises(backbones.CheckpointError, match="1 tensors missing"):
        backbones.load_checkpoint(other, tensors)
