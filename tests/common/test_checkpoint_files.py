"""Checkpoint files: intact, truncated, corrupted, malicious, or of another format."""

from __future__ import annotations

import io
import os
import pickle
import sys
import warnings
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from zoo import small

from backbones import CheckpointError, load_checkpoint
from backbones.common.checkpoint_files import DamagedFileError, read_file

WEIGHTS = {"a.weight": torch.arange(1000.0), "b": torch.ones(3, 2, dtype=torch.bfloat16)}


def _save(weights: dict[str, Tensor], path: Path, form: str) -> bytes:
    if form == "safetensors":
        save_file(weights, path)
    else:
        torch.save(weights, path, _use_new_zipfile_serialization=form == "zip")
    return path.read_bytes()


@pytest.mark.parametrize("name", ["a.pth", "a.safetensors", "a"])
@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
def test_format_is_detected_by_content(form, name, tmp_path):
    _save(WEIGHTS, tmp_path / name, form)
    read = read_file(tmp_path / name)
    assert read.keys() == WEIGHTS.keys()
    assert all(torch.equal(read[key], WEIGHTS[key]) for key in WEIGHTS)


@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_truncated_files(form, share, tmp_path):
    model = small("van")
    data = _save(model.state_dict(), tmp_path / "whole.pth", form)
    cut = tmp_path / "cut.pth"
    cut.write_bytes(data[: int(len(data) * share)])
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"cut\.pth is") as raised:
        load_checkpoint(model, cut)
    assert isinstance(raised.value, DamagedFileError)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def _flip(data: bytearray, place: int, bit: int) -> bytes:
    data[place] ^= 1 << bit
    return bytes(data)


def _folder(data: bytearray) -> bytes:
    """Left unread by torch, the tensor would be whatever was in memory."""
    return _flip(data, data.rindex(b"PK\x01\x02", 0, data.rindex(b"/data/0")) + 38, 4)


def _weight(data: bytearray) -> int:
    return data.index(WEIGHTS["a.weight"].numpy().tobytes()) + 400


def _twice(data: bytearray) -> bytes:
    with zipfile.ZipFile(whole := io.BytesIO(data), "a") as archive:
        archive.writestr(archive.namelist()[-1], b"")
    return whole.getvalue()


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda data: _flip(data, _weight(data), 0), "truncated or corrupt: Bad CRC-32 for file "),
        (_folder, ".*data/0 is marked as a folder"),
        (_twice, "truncated or corrupt"),
    ],
    ids=["bit", "folder", "twice"],
)
def test_damaged_archives(spoil, said, tmp_path):
    """Torch does not notice a flipped bit."""
    data = bytearray(_save(WEIGHTS, tmp_path / "a.pth", "zip"))
    (tmp_path / "a.pth").write_bytes(spoil(data))
    with pytest.raises(DamagedFileError, match=rf"a\.pth is {said}"):
        read_file(tmp_path / "a.pth")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"<html><title>404</title></html>", "a web page"),
        (b"\xef\xbb\xbf\r\n <!DOCTYPE html>\n<html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "a Git LFS pointer"),
        (b"", "empty"),
        (b"no weights", "neither a torch.save file nor safetensors|not a complete safetensors"),
        (pickle.dumps({"a": 1}), "a bare pickle"),
        (b"PK\x03\x04 and more", "truncated or corrupt: File is not a zip file"),
    ],
)
@pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
def test_unknown_formats(content, said, name, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DamagedFileError, match=f"{name} is ({said})") as raised:
        read_file(tmp_path / name)
    assert "\n" not in str(raised.value)


class _Hostile:
    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call[0], self.call[1:]


@pytest.mark.parametrize(
    ("content", "blocked"),
    [
        ({"state_dict": _Hostile(os.system, "touch hostile")}, f"{os.system.__module__}.system"),
        ({"state_dict": _Hostile(eval, "open('hostile', 'w')")}, "eval"),
        (torch.nn.Linear(1, 1), "torch.nn.modules.linear.Linear"),
    ],
    ids=["system", "eval", "module"],
)
@pytest.mark.parametrize("form", ["zip", "legacy", "bare"])
def test_pickles_are_not_executed(content, blocked, form, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "a.pth"
    if form == "bare":
        path.write_bytes(pickle.dumps(content))
        expected = r"a\.pth is a bare pickle, not a torch.save file; it was not executed"
    else:
        _save(content, path, form)
        expected = (
            rf"a\.pth contains more than tensors and plain values: {blocked}; it was not executed"
        )
    with pytest.raises(CheckpointError, match=expected) as raised:
        read_file(path)
    message = str(raised.value)
    assert "weights_only" not in message and "\n" not in message and "safe_globals" not in message
    assert not (tmp_path / "hostile").exists()


def test_logs_of_openmmlab_are_skipped(tmp_path, monkeypatch):
    """Whether its packages are installed or not: here they are gone when the file is read."""
    name = "mmengine.logging.history_buffer"
    history = type("HistoryBuffer", (), {"__module__": name, "__qualname__": "HistoryBuffer"})
    with monkeypatch.context() as patch:
        for part in ("mmengine", "mmengine.logging", name):
            patch.setitem(sys.modules, part, SimpleNamespace(HistoryBuffer=history))
        log = {"loss": history(), "best": np.float64(0.5)}
        torch.save({"state_dict": WEIGHTS, "message_hub": log}, tmp_path / "epoch_1.pth")
    monkeypatch.setitem(sys.modules, "mmengine", None)
    assert read_file(tmp_path / "epoch_1.pth")["state_dict"].keys() == WEIGHTS.keys()


def test_what_is_no_file_of_weights(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch.jit
        torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"a\.pt is a TorchScript archive.*state_dict\(\)"):
        read_file(tmp_path / "a.pt")
    for source in (tmp_path / "nowhere.pth", tmp_path, "\0"):
        told = None if source == "\0" else str(source)
        with pytest.raises(FileNotFoundError, match=told):
            load_checkpoint(small("van"), source)
    with pytest.raises(TypeError, match="got BytesIO"):
        load_checkpoint(small("van"), io.BytesIO())  # type: ignore[arg-type]


def test_headers_of_safetensors(tmp_path):
    path = tmp_path / "a.safetensors"
    data = _save({"a": torch.zeros(2, 3), "b": torch.ones(2)}, path, "safetensors")
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length].decode()
    for old, new in (
        ('"F32"', '"F64"'),  # as many bytes as there are not
        ('"F32"', '"XYZ"'),
        ("[2,3]", "[3,3]"),
        ("[2,3]", "[-2,-3]"),
        ("[0,24]", "[4,28]"),  # overlaps its neighbour
        ("[24,32]", "[24,999]"),
        ('"b":', '"a":'),  # one name for two
        ("{", "["),
    ):
        assert old in header
        text = header.replace(old, new, 1).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
        with pytest.raises(DamagedFileError, match="is not a complete safetensors file|neither"):
            read_file(path)
