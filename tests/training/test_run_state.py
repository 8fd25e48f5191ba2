"""Checkpoint files: atomic, verified, and free of code."""

import zipfile

import pytest
import torch
from faults import Malicious

from backbones.common.errors import FileError
from backbones.training.resumable import PREVIOUS, load_state, save_state

STATE = {"model": {"weight": torch.arange(1000.0)}, "epoch": 3, "history": [{"loss": 0.5}]}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "last.pt"


def test_round_trip_keeps_the_one_before(path):
    save_state(path, STATE)
    save_state(path, {**STATE, "epoch": 4})
    assert load_state(path)["epoch"] == 4
    assert load_state(path.with_name(PREVIOUS))["epoch"] == 3
    assert torch.equal(load_state(path)["model"]["weight"], STATE["model"]["weight"])
    assert {p.name for p in path.parent.iterdir()} == {"last.pt", "last.prev.pt"}


def test_no_file(path):
    with pytest.raises(FileError, match="there is no checkpoint"):
        load_state(path)


def test_a_foreign_file(path):
    for state, said in (
        ({"weights": torch.zeros(1)}, "has no training state"),
        ({"model": {}, "format": 2}, "has format 2, this version reads 1: resume with"),
        ({"model": Malicious()}, "more than tensors .*: eval; it was not executed"),
    ):
        torch.save(state, path)
        with pytest.raises(FileError, match=said):
            load_state(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a", "b")
    with pytest.raises(FileError, match="is truncated or not a checkpoint"):
        load_state(path)


def test_a_file_system_without_links(path, monkeypatch):
    def link(*_):
        raise OSError("not supported")

    monkeypatch.setattr("os.link", link)
    save_state(path, STATE)
    save_state(path, {**STATE, "epoch": 4})
    assert load_state(path)["epoch"] == 4
    assert load_state(path.with_name(PREVIOUS))["epoch"] == 3
