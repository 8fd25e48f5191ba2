"""What measures accuracy: figures, resuming, failing toolkits, trainings, command lines."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from zoo import CLASSIFIERS, small

import backbones
from ops.cpu.gemm.int8 import not_faster_in_int8


def digits(tool: ModuleType, count: int = 5) -> Any:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(count, 3, 64, 64, generator=generator)
    model = small("shvit", num_classes=10).eval()
    return tool.Digits(model, images[:2], images, torch.arange(count))


def test_agreement_and_top1(tool):
    exact = torch.eye(4)
    other = exact[[0, 1, 2, 0]]
    found = tool.compare(other, exact, torch.tensor([0, 1, 3, 3]))
    assert found["top1"] == 50 and found["agreement"] == 75
    assert found["error"] == pytest.approx((2 / 4) ** 0.5)


def test_batches_are_filled_up(tool):
    shapes = []

    def run(images: torch.Tensor) -> torch.Tensor:
        shapes.append(tuple(images.shape))
        return images.flatten(1).sum(1, keepdim=True)

    images = torch.arange(5.0).reshape(5, 1, 1, 1)
    assert tool.predict(run, images, 2).flatten().tolist() == [0, 1, 2, 3, 4]
    assert shapes == [(2, 1, 1, 1)] * 3


def test_the_row_of_a_classifier(tool):
    row = tool.of_digits(digits(tool))
    assert (row["images"], row["calibration_images"]) == (5, 2)
    assert list(row["forms"]) == ["float32", *tool.FORMS]
    assert row["forms"]["float32"]["agreement"] == 100
    assert row["forms"]["fused"]["error"] < 1e-4
    for label in ("int8", "int8_calibrated"):
        figures = row["forms"][label]
        assert "reason" in figures or 0 < figures["quantized"] <= row["layers"]
        assert figures["error"] < 0.2


def test_the_row_of_a_restorer(tool):
    generator = torch.Generator().manual_seed(0)
    pair = tuple(torch.rand(3, side, side, generator=generator) for side in (16, 32))
    model = small("hat").eval()
    row = tool.of_pictures(tool.Pictures(model, [pair[0].unsqueeze(0)], [pair]))
    exact = row["forms"]["float32"]["psnr"]
    assert row["forms"]["fused"]["psnr"] == pytest.approx(exact, abs=0.01)
    assert row["forms"]["int8"]["psnr"] == pytest.approx(exact, abs=0.5)


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A run of the smallest SHViT, untrained."""
    folder = tmp_path / "runs" / "shvit_s1"
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    model = backbones.create_model("shvit_s1", num_classes=10)
    save_file(model.state_dict(), folder / "best.safetensors")
    text = "model: shvit_s1\ndata: digits\nimg_size: 32\nworkers: 4\n"
    (folder / "config.yaml").write_text(text)
    return folder.parent


def test_a_run_has_its_images(tool, run_folder):
    run = tool.digits_run(run_folder, "shvit_s1")
    assert not run.model.training
    assert run.calibration.shape == (64, 3, 32, 32)
    assert run.images.shape == (355, 3, 32, 32) and run.labels.shape == (355,)
    again = tool.digits_run(run_folder, "shvit_s1")
    assert torch.equal(run.calibration, again.calibration)


@pytest.mark.parametrize("command", ["int8", "agreement"])
def test_each_model_is_measured_once(command, tool, tmp_path, monkeypatch):
    measured: list[str] = []
    trained: list[str] = []

    def measure(name: str, *_: Any) -> dict[str, Any]:
        measured.append(name)
        figures = {"float32": {"top1": 50.0, "skipped": "no"}}
        return {"model": name, "forms": figures, "contenders": figures}

    monkeypatch.setattr(
        tool, {"int8": "measure_model", "agreement": "of_agreement"}[command], measure
    )
    monkeypatch.setattr(tool, "train", lambda name, folder: trained.append(name))
    (tmp_path / "van_b0").mkdir()
    (tmp_path / "van_b0" / "best.safetensors").touch()
    run = getattr(tool, command)
    words = ["--checkpoints", str(tmp_path), "--output", str(tmp_path / "out.json")]
    run([*words, "--models", "van_b0", "vig_t"])
    assert measured == ["van_b0"] and not trained
    again = ["--models", "van_b0", "vig_t", "--resume"]
    if command == "int8":
        run([*words, *again, "--train"])
        assert trained == ["vig_t"]
    else:
        (tmp_path / "van_b0").rename(tmp_path / "vig_t")
        run([*words, *again])
    assert measured == ["van_b0", "vig_t"]
    report = json.loads((tmp_path / "out.json").read_text())
    assert [row["model"] for row in report["results"]] == ["van_b0", "vig_t"]
    assert report["machine"]["name"] and report["machine"]["instruction_set"]


def test_contenders_that_fail_are_recorded(tool, contenders, tmp_path, monkeypatch):
    calls: list[Any] = []

    def works(model: Any, images: Any, folder: Path) -> Any:
        calls.append(tuple(images[0].shape))
        return (lambda threads: model), 123

    def fails(model: Any, images: Any, folder: Path) -> Any:
        calls.append("fails")
        raise KeyError("no such operator")

    toolkits = {"works": works, "fails": fails}
    monkeypatch.setattr(tool, "TOOLKITS", toolkits)
    monkeypatch.setattr(tool, "digits_run", lambda folder, name: digits(tool))
    row = tool.of_agreement("shvit_s1", tmp_path, list(toolkits))
    assert calls == [(1, 3, 64, 64), "fails"]
    found = row["contenders"]
    ours = ["float32", "fused", "fused+bfloat16", "int8", "int8_calibrated"]
    assert list(found) == [*ours, "works", "fails"]
    assert found["works"]["agreement"] > 99 and found["works"]["bytes"] == 123
    assert found["fails"] == {"skipped": "KeyError: 'no such operator'"}
    assert found["fused"]["error"] < 1e-4 and found["int8"]["error"] < 0.2
    if not_faster_in_int8(torch.device("cpu")) is None:
        assert found["int8"]["error"] > 1e-4


def test_parity_of_a_family_is_measured_and_the_others_stay(tool, tmp_path, monkeypatch):
    monkeypatch.setattr(tool.originals, "case_errors", lambda *case: (1e-7, [2e-7, 3e-7]))
    path = tmp_path / "parity.json"
    path.write_text('{"results": {"van_b0": {"output": 1.0}}}')
    tool.parity(["shvit", "--output", str(path)])
    found = json.loads(path.read_text())["results"]
    assert list(found) == ["shvit_s1", "shvit_s2", "shvit_s3", "shvit_s4", "van_b0"]
    assert found["van_b0"] == {"output": 1.0}
    assert (found["shvit_s1"]["output"], found["shvit_s1"]["stages"]) == (1e-7, 3e-7)


def test_results_of_another_recipe_do_not_stay(tool, tmp_path, monkeypatch):
    path = tmp_path / "learning.json"
    path.write_text('{"recipe": {"img_size": 1}, "results": {"van_b0": {}}}')
    trained: list[str] = []

    def train(model: str) -> dict[str, Any]:
        trained.append(model)
        return {"family": model.split("_")[0]}

    monkeypatch.setattr(tool, "train_variant", train)
    tool.learning(["shvit_s1", "van_b0", "--output", str(path)])
    report = json.loads(path.read_text())
    assert trained == list(report["results"]) == ["shvit_s1", "van_b0"]
    tool.learning(["--output", str(path)])
    assert len(trained) == len(set(trained)) == len(CLASSIFIERS)
    report = json.loads(path.read_text())
    assert not any("machine" in result for result in report["results"].values())
    path.write_text(json.dumps({**report, "machine": "another"}))
    tool.learning(["van_b0", "--output", str(path)])
    results = json.loads(path.read_text())["results"]
    assert "machine" in results["van_b0"] and "machine" not in results["shvit_s1"]


def test_a_training(tool):
    result = tool.train_variant("shvit_s1")
    assert result["family"] == "shvit" and len(result["history"]) == 4
    assert result["history"][-1]["val_top1"] > 95


@pytest.mark.slow
@pytest.mark.parametrize("label", ["onnxruntime_static", "onnxruntime_dynamic"])
def test_onnx_runtime_quantises(contenders, label, tmp_path):
    model = small("inception_next", num_classes=10).eval().fuse(channels_last=False)
    images = list(torch.randn(4, 1, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
    start, size = contenders.TOOLKITS[label](model, images, tmp_path)
    with torch.inference_mode():
        exact, got = model(images[0]), start(1)(images[0])
    assert (got - exact).norm() < 0.2 * exact.norm()
    assert size < sum(p.nbytes for p in model.parameters())
