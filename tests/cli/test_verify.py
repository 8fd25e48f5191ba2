"""``verify``: identification of checkpoints, and comparison stage by stage."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import backbones
from backbones.cli import parity
from backbones.cli.main import main
from backbones.cli.verify import closest, released_file
from backbones.common.checkpoint_files import sha256_of


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with the names and shapes of a release."""
    path = tmp_path_factory.mktemp("release") / "shvit_s1.pth"
    torch.save({"model": parity.checkpoint(parity.reference("shvit", "shvit_s1"))}, path)
    return path


def test_a_release(published, capsys):
    assert main(["verify", "--checkpoint", str(published)]) == 0
    out = capsys.readouterr().out
    assert "names and shapes match the original's shvit_s1" in out
    assert "shvit_s1.in1k: https://github.com/ysj9909/SHViT/releases" in out
    assert "into shvit_s1, 1000 classes, strictly" in out
    assert "outputs of these weights: finite" in out
    assert out.count("✓") == 4
    assert sha256_of(published) in out
    assert main(["verify", str(published)]) == 0  # a file in the place of a model
    assert capsys.readouterr().out == out
    assert main(["verify", "shvit_s1"]) == 0 and capsys.readouterr().out.count("✓") == 4


def test_tables_that_follow_from_the_sizes_are_no_difference():
    """RAVLT's files have its angles, whether or not a file of the same weights has them, too."""
    figures = parity.reference("ravlt", "ravlt_t")
    tensors = {
        name: torch.empty(n, dtype=getattr(torch, t)) for name, n, t in figures["state_dict"]
    }
    angles = [name for name in tensors if name.endswith("RoPE.angle")]
    assert angles
    for left_out in ([], angles):
        kept = {name: tensor for name, tensor in tensors.items() if name not in left_out}
        (match,) = closest(kept)
        assert (match.variant, match.differences) == ("ravlt_t", 0)


@pytest.mark.parametrize(
    ("value", "status", "told"),
    [(torch.nan, 1, "NaN or infinite"), (1e30, 2, "the outputs of these weights are not finite")],
)
def test_non_finite_weights_and_outputs(value, status, told, published, tmp_path, capsys):
    """Products of large finite weights overflow."""
    tensors = torch.load(published, weights_only=True)["model"]
    for tensor in tensors.values():
        if tensor.is_floating_point() and tensor.ndim == 4:
            tensor.fill_(value)
    torch.save(tensors, tmp_path / "bad.pth")
    words = ["verify", "--checkpoint", str(tmp_path / "bad.pth"), "--size", "32"]
    assert main(words) == status
    said = capsys.readouterr()
    assert told in (said.err if status == 2 else said.out)


def test_code_that_differs(published, monkeypatch, capsys):
    for wrong, word in ((1.0, "shvit_s1"), (float("nan"), str(published))):
        monkeypatch.setattr(parity, "case_errors", lambda *_, wrong=wrong: (0.0, [0.0, wrong, 0.0]))
        assert main(["verify", word]) == 1
        (line,) = (line for line in capsys.readouterr().out.splitlines() if "✗" in line)
        assert line.startswith("stage 2")


def test_checkpoints_that_do_not_load(published, tmp_path, capsys):
    assert main(["verify", "van_b0", "--checkpoint", str(published)]) == 1
    assert f"loading: fails: {published}" in capsys.readouterr().out
    tensors = torch.load(published, weights_only=True)["model"]
    tensors.pop("head.l.weight", None)
    tensors.pop(next(iter(tensors)))
    torch.save(tensors, tmp_path / "cut.pth")
    assert main(["verify", "--checkpoint", str(tmp_path / "cut.pth")]) == 1
    out = capsys.readouterr().out
    assert "closest is the original's shvit_s1, with 2 missing" in out
    torch.save({"x": torch.ones(2)}, tmp_path / "other.pth")
    assert main(["verify", "--checkpoint", str(tmp_path / "other.pth")]) == 2
    assert "does not resemble any" in capsys.readouterr().out


def test_own_weights_are_known(tmp_path, capsys):
    model = backbones.create_model("efficientvit_m0", num_classes=5)
    torch.save(model.state_dict(), tmp_path / "own.pth")
    assert main(["verify", "--checkpoint", str(tmp_path / "own.pth")]) == 0
    out = capsys.readouterr().out
    assert "weights of efficientvit_m0 in this library's format" in out
    assert "into efficientvit_m0, 5 classes, strictly" in out


def test_releases_with_a_checksum_in_their_name():
    figures = parity.reference("van", "van_b4")
    digest = "f4665b92" + 56 * "0"
    found = released_file(figures, digest)
    assert found is not None
    assert found.endswith("van-b4_3rdparty_in1k_20220909-f4665b92.pth")
    assert released_file(figures, 64 * "1") is None
