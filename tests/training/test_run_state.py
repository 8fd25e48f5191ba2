"""Checkpoint files: atomic, verified, and free of code."""

import io
import pickle
import random
import zipfile

import numpy as np
import pytest
import torch
from faults import Malicious

from backbones.common.errors import FileError
from backbones.common.generators import get_rng_state, set_rng_state
from backbones.training.run_state import load_latest, load_state, previous_path, save_state

STATE = {"model": {"weight": torch.arange(1000.0)}, "epoch": 3, "history": [{"loss": 0.5}]}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "last.pt"


def test_round_trip_keeps_the_one_before(path):
    save_state(path, STATE)
    save_state(path, {**STATE, "epoch": 4})
    assert load_state(path)["epoch"] == 4
    assert load_state(previous_path(path))["epoch"] == 3
    assert torch.equal(load_state(path)["model"]["weight"], STATE["model"]["weight"])
    assert {p.name for p in path.parent.iterdir()} == {"last.pt", "last.prev.pt"}


def damage_truncate(data):
    return data[: len(data) // 2]


def damage_flip(data):
    place = data.index(np.arange(1000, dtype=np.float32).tobytes()) + 400
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


@pytest.mark.parametrize("damage", [damage_truncate, damage_flip, lambda data: b""])
def test_a_damaged_file_falls_back_to_the_previous_one(damage, path):
    save_state(path, STATE)
    save_state(path, {**STATE, "epoch": 4})
    path.write_bytes(damage(path.read_bytes()))
    state, used, problem = load_latest(path)
    assert (state["epoch"], used) == (3, previous_path(path))
    assert str(path) in problem
    previous_path(path).write_bytes(b"no")
    with pytest.raises(FileError, match=r"last\.pt.*last\.prev\.pt"):
        load_latest(path)


def test_no_file(path):
    assert load_latest(path) is None
    with pytest.raises(FileError, match="there is no checkpoint"):
        load_state(path)


def test_a_foreign_file(path):
    torch.save({"weights": torch.zeros(1)}, path)
    with pytest.raises(FileError, match="has no training state"):
        load_state(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a", "b")
    with pytest.raises(FileError, match="is truncated or not a checkpoint"):
        load_state(path)


def test_a_pickle_with_code_is_rejected(path):
    torch.save({"model": Malicious()}, path)
    with pytest.raises(FileError, match="more than tensors .*: eval; it was not executed") as e:
        load_state(path)
    assert "weights_only" not in str(e.value) and "\n" not in str(e.value)
    path.write_bytes(pickle.dumps({"model": Malicious()}))
    with pytest.raises(FileError, match="bare pickle.*it was not executed"):
        load_state(path)


def test_a_file_system_without_links(path, monkeypatch):
    def link(*_):
        raise OSError("not supported")

    monkeypatch.setattr("os.link", link)
    save_state(path, STATE)
    save_state(path, {**STATE, "epoch": 4})
    assert load_state(path)["epoch"] == 4
    assert load_state(previous_path(path))["epoch"] == 3


def test_random_generators_resume():
    stored = io.BytesIO()
    torch.save(get_rng_state(), stored)
    first = random.random(), np.random.rand(3), np.random.normal(), torch.rand(3)
    stored.seek(0)
    set_rng_state(torch.load(stored, weights_only=True))
    again = random.random(), np.random.rand(3), np.random.normal(), torch.rand(3)
    assert first[0] == again[0] and first[2] == again[2]
    assert np.array_equal(first[1], again[1]) and torch.equal(first[3], again[3])
