"""The mean of checkpoints, and files that cannot be averaged."""

import pytest
import safetensors.torch
import torch


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
    ("spoilt", "name", "told"),
    [
        ({"a.weight": torch.zeros(2, 4)}, "x.safetensors", "of another architecture"),
        ({"a.weight": torch.full((2, 3), torch.inf)}, "x.safetensors", "a.weight is not finite"),
        ({}, "x.pth", "must end in .safetensors"),
        (None, "x.safetensors", "no checkpoint at"),
    ],
)
def test_what_cannot_be_averaged(spoilt, name, told, tool, files, tmp_path, capsys):
    if spoilt is None:
        files[1].unlink()
    else:
        torch.save({**weights(1.0), **spoilt}, files[1])
    assert tool.main([*map(str, files), "--output", str(tmp_path / name)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and told in said
    assert not (tmp_path / name).exists()
