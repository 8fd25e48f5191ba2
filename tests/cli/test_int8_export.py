"""``export --int8`` to safetensors: what other commands make of the file, errors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from embedding_runs import make_photos
from safetensors.torch import load_file

import backbones
from backbones.cli.main import main
from backbones.common.files import save_weights
from backbones.core.loaded import load
from ops.cpu import policy
from ops.cpu.gemm.int8 import not_faster_in_int8

_REASON = not_faster_in_int8(torch.device("cpu"))
_needs_int8 = pytest.mark.skipif(_REASON is not None, reason=f"{_REASON}")


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """The checkpoint of a run with three classes, of a shallow model."""
    run = tmp_path / "run"
    run.mkdir()
    torch.manual_seed(0)
    model = backbones.create_model("shvit_s1", num_classes=3, depths=(1, 1, 1))
    facts = {"model": "shvit_s1", "classes": '["cat", "dog", "owl"]'}
    save_weights(run / "best.safetensors", model.state_dict(), facts)
    recipe = {"model": "shvit_s1", "num_classes": 3, "img_size": 64, "data": "x", "crop_pct": 1.0}
    recipe["model_args"] = {"depths": [1, 1, 1]}
    (run / "config.yaml").write_text(yaml.safe_dump(recipe))
    return run / "best.safetensors"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return make_photos(tmp_path / "photos", 3)


@_needs_int8
def test_the_file_stands_alone(trained, photos, tmp_path, capsys):
    """It has the recipe, and predicts as the checkpoint does in int8 with these ranges."""
    path = tmp_path / "elsewhere" / "model.safetensors"
    path.parent.mkdir()
    words = ["export", "shvit_s1", "--checkpoint", str(trained), "--size", "64", "--int8"]
    options = ["--calibration", str(photos), "--max-drop", "0.5", "--out", str(path)]
    assert main([*words, *options]) == 0
    said = capsys.readouterr().out.splitlines()
    assert "layers in int8 (calibrated ranges)" in said[0]
    assert said[1].startswith("  int8 agrees with float in ")
    assert said[2].startswith(f"{path}: shvit_s1 in int8 for any batch and size, ")
    assert [p.name for p in path.parent.iterdir()] == ["model.safetensors"]
    assert torch.int8 in {tensor.dtype for tensor in load_file(path).values()}

    loaded = load(None, path)
    assert loaded.recipe is not None and loaded.recipe.img_size == 64
    assert loaded.classes == ["cat", "dog", "owl"] and loaded.model.precision.calibrated
    outputs = []
    for dtype in ([], ["--dtype", "int8"]):
        assert main(["predict", str(photos), "--checkpoint", str(path), *dtype]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] and "owl" in outputs[0]
    assert main(["predict", str(photos), "--checkpoint", str(path), "--cam", "x.png"]) == 2
    assert "--cam needs weights from before fuse()" in capsys.readouterr().err
    words = ["embed", str(photos), "--checkpoint", str(path), "--out", str(tmp_path / "embedded")]
    assert main(words) == 0
    assert main(["verify", "shvit_s1", "--checkpoint", str(path)]) == 0
    assert "outputs of these weights: finite" in capsys.readouterr().out
    words = ["export", "shvit_s1", "--checkpoint", str(path), "--out", str(tmp_path / "x.onnx")]
    assert main(words) == 2
    assert "has int8 weights, which cannot be exported" in capsys.readouterr().err


@_needs_int8
@pytest.mark.parametrize("fault", ["", "loading", "nothing to gain"])
def test_without_images(fault, trained, tmp_path, capsys, monkeypatch):
    path = tmp_path / "model.safetensors"
    told = "(a range for each row of inputs)"
    if fault == "loading":
        told = f"error: shvit_s1: {path} has NaN or infinite weights; it was not written"

        def refuse(model: torch.nn.Module, path: Path) -> None:
            raise backbones.CheckpointError(f"{path} has NaN or infinite weights")

        monkeypatch.setattr(backbones, "load_checkpoint", refuse)
    elif fault:
        told = "error: shvit_s1: no layer would gain from int8 here; 0 of "
        for name in ("_FEWEST_IN_INT8", "_FEWEST_IN_INT8_OF_TILES"):
            monkeypatch.setattr(policy, name, 1 << 40)
    words = ["export", "shvit_s1", "--checkpoint", str(trained), "--int8", "--out", str(path)]
    for _ in range(2):  # an earlier result is replaced
        assert main(words) == (2 if fault else 0)
    said = capsys.readouterr()
    assert told in said.out + said.err and path.exists() is not bool(fault)


def test_runs_of_restoration(tmp_path):
    """Their recipe has the model's arguments; preprocessing is the model's own."""
    arguments = {"dim": 24, "depths": [2], "num_heads": [2], "window_size": 8}
    model = backbones.create_model("hat_nano_x2", in_chans=1, **arguments)
    save_weights(tmp_path / "best.safetensors", model.state_dict(), {})
    recipe = {"model": "hat_nano_x2", "task": "sr", "in_chans": 1, "model_args": arguments}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(recipe))
    loaded = load(None, tmp_path / "best.safetensors")
    assert loaded.name == "hat_nano_x2" and loaded.recipe is None
    assert loaded.model.in_chans == 1 and len(loaded.model.stages) == 1
