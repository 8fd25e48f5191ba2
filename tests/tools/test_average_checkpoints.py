"""The mean of checkpoints, and files that cannot be averaged."""

import runpy
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

PATH = Path(__file__).parents[2] / "tools" / "average_checkpoints.py"


@pytest.fixture(scope="module")
def tool(tools):
    return tools("average_checkpoints")


def weights(value, dtype=torch.float32):
    return {"a.weight": torch.full((2, 3), value, dtype=dtype), "count": torch.tensor(int(value))}


@pytest.fixture
def files(tmp_path):
    paths = [tmp_path / name for name in ("a.safetensors", "b.pth", "last.pt")]
    safetensors.torch.save_file(weights(1.0), paths[0])
    torch.save({"state_dict": weights(2.0)}, paths[1])
    torch.save({"model": weights(100.0), "model_ema": weights(6.0), "epoch": 3}, paths[2])
    return paths


def test_the_mean(tool, files, tmp_path):
    output = tmp_path / "soup.safetensors"
    assert tool.main([*map(str, files), "--output", str(output)]) == 0
    mean = safetensors.torch.load_file(output)
    assert torch.equal(mean["a.weight"], torch.full((2, 3), 3.0))
    assert mean["count"] == 1


def test_half_precision_does_not_add_up_errors(tool, tmp_path):
    paths = [tmp_path / f"{i}.safetensors" for i in range(9)]
    for path in paths:
        safetensors.torch.save_file(weights(0.1, torch.bfloat16), path)
    mean = tool.average(paths)["a.weight"]
    assert torch.equal(mean, weights(0.1, torch.bfloat16)["a.weight"])


@pytest.mark.parametrize(
    "other", [{"b.weight": torch.zeros(2, 3)}, {"a.weight": torch.zeros(2, 4)}]
)
def test_another_architecture(other, tool, files, tmp_path, capsys):
    torch.save({**weights(1.0), **other}, tmp_path / "other.pth")
    words = [
        str(files[0]),
        str(tmp_path / "other.pth"),
        "--output",
        str(tmp_path / "x.safetensors"),
    ]
    assert tool.main(words) == 2
    assert "of another architecture" in capsys.readouterr().err
    assert not (tmp_path / "x.safetensors").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_weights(value, tool, files, tmp_path, capsys):
    torch.save({"a.weight": torch.full((2, 3), value), "count": torch.tensor(1)}, files[1])
    words = [*map(str, files), "--output", str(tmp_path / "x.safetensors")]
    assert tool.main(words) == 2
    assert "b.pth: a.weight is not finite" in capsys.readouterr().err
    assert not (tmp_path / "x.safetensors").exists()


def test_output_with_a_misleading_suffix(tool, files, tmp_path, capsys):
    assert tool.main([str(files[0]), "--output", str(tmp_path / "soup.pth")]) == 2
    assert "must end in .safetensors" in capsys.readouterr().err


def test_a_missing_file_from_the_shell(tmp_path, monkeypatch, capsys):
    words = [str(tmp_path / "no.pt"), "--output", str(tmp_path / "x.safetensors")]
    monkeypatch.setattr(sys, "argv", [str(PATH), *words])
    with pytest.raises(SystemExit) as leaving:
        runpy.run_path(str(PATH), run_name="__main__")
    assert leaving.value.code == 2
    assert capsys.readouterr().err.startswith("error: no checkpoint at")
