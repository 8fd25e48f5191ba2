"""Failed exports print one line and leave no files."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from faults import files_that_may_not_grow
from safetensors.torch import save
from torch import Tensor, nn

from backbones.cli import graphs, quantizing
from backbones.cli.export import export
from backbones.cli.main import main
from backbones.common import files
from backbones.common.errors import FileError
from backbones.common.files import replacing_together
from backbones.core.loaded import Loaded


class Plain(nn.Module):
    """One convolution, of more bytes than the limit below."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 64, 3)
        self.in_chans, self.num_classes = 3, 0
        self.pretrained_cfg = {"input_size": (3, 16, 16)}

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("shvit_s1 --int8 --out x.onnx", "--int8 needs --calibration FOLDER; give a folder of"),
        ("shvit_s1 --int8 --calibration . --out x.onnx", "no images in .; give a folder of"),
        ("shvit_s1 --int8 --calibration no --out x.onnx", "no image at no; give a folder of"),
        ("shvit_s1 --calibration . --out x.onnx", "--calibration requires --int8"),
        (
            "shvit_s1 --int8 --calibration . --calibration-images 0 --out x.onnx",
            "--calibration-images must be 1 or more, got 0",
        ),
        ("shvit_s1 --int8 --out x.pt2", "--int8 requires ONNX or safetensors"),
        ("shvit_s1 --out x.safetensors", "safetensors are only for --int8"),
        ("shvit_s1 --max-drop 0.1 --out x.onnx", "--max-drop needs safetensors"),
        ("shvit_s1 --int8 --max-drop 0 --out x.safetensors", "must be above 0"),
        ("shvit_s1 --int8 --dynamic --out x.safetensors", "omit --dynamic"),
        ("shvit_s1 --int8 --batch 2 --out x.safetensors", "omit --batch"),
        ("shvit_s1 --int8 --fused --out x.safetensors", "omit --fused"),
        (f"shvit_s1 --size {10**30} --dynamic --out x.onnx", "--size must be one side"),
        ("shvit_s1 --size 64 --batch 9999999999 --out x.pt2", "reduce --size or --batch"),
        ("shvit_s9 --out x.pt2", "unknown model 'shvit_s9'"),
        ("shvit_s1 --checkpoint no.pth --out x.pt2", "no checkpoint at no.pth"),
        ("shvit_s1 --out .", "--out . is a folder: name a file in it"),
        ("shvit_s1 --out no/such/x.pt2", "there is no folder no/such"),
        ("shvit_s1 --out file/x.pt2", "there is no folder file"),
        (f"shvit_s1 --out {'a' * 300}.pt2", "File name too long"),
        ("shvit_s1 --out file", "--out file must end in .onnx"),
        ("shvit_s1 --format pt2 --out x.onnx", "--out x.onnx must end in .pt2"),
        ("shvit_s1 --checkpoint w.onnx --out w.onnx", "would overwrite w.onnx, an input"),
        ("shvit_s1 --out link.pt2", "w.onnx, to which it is a link, does not"),
        ("shvit_s1 --out w.onnx", "w.onnx exists and is not an earlier result"),
        ("shvit_s1 --int8 --out w.safetensors", "w.safetensors exists and is not an earlier"),
        ("shvit_s1 --out a\udcff.pt2", "a\\udcff.pt2 is not UTF-8, which the libraries"),
        ("shvit_s1 --out \udcff.onnx", "is not UTF-8"),
        ("shvit_s1 --int8 --out \udcff.safetensors", "is not UTF-8"),
        ("shvit_s1 --out /dev/null", "/dev/null is not a regular file"),
    ],
)
def test_one_line(words, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    Path("w.onnx").write_bytes(b"weights")
    Path("w.safetensors").write_bytes(save({"weight": torch.zeros(1)}))
    Path("link.pt2").symlink_to("w.onnx")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert main(["export", *words.split()]) == 2
    printed = capsys.readouterr()
    (line,) = printed.err.splitlines()
    assert line.startswith("error: ") and said in line
    assert not printed.out
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_size_whose_feature_maps_do_not_fit(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("backbones.common.memory.available_memory", lambda device: 4_000_000)
    words = ["export", "shvit_s1", "--size", "512", "--out", str(tmp_path / "x.pt2")]
    assert main(words) == 2  # an image has 3 MB
    assert "images of 1×3×512×512 need more than 0.0" in capsys.readouterr().err


def test_unwritable_folder(tmp_path, monkeypatch):
    def refuse(path: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(files.Path, "mkdir", refuse)
    with pytest.raises(FileError, match=r"^cannot write .*x\.pt2: Permission denied$"):
        export(Loaded(Plain().eval(), "plain"), tmp_path / "x.pt2", "pt2", (16, 16))


@pytest.mark.parametrize("ending", ["onnx", "pt2"])
def test_files_larger_than_the_limit(ending, tmp_path):
    path = tmp_path / f"x.{ending}"
    path.write_text("as it was")
    said = f"cannot write {path}: `ulimit -f` or the file"
    with files_that_may_not_grow(2000), pytest.raises(FileError, match=said):
        export(Loaded(Plain().eval(), "plain"), path, ending, (16, 16))
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert path.read_text() == "as it was"


def test_a_full_disk_while_quantising(tmp_path, monkeypatch):
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "x.onnx"
    monkeypatch.setattr("onnxruntime.quantization.shape_inference.quant_pre_process", full)
    with pytest.raises(FileError, match="no space is left in"), replacing_together(path) as scratch:
        quantizing.quantize(scratch, [torch.zeros(1, 3, 16, 16)])
    assert list(tmp_path.iterdir()) == []


def test_disk_space_is_checked_first(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1_000_000))
    assert main(["export", "shvit_s1", "--out", str(tmp_path / "x.pt2")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert (
        "no space left on the disk" in line
        and f"{tmp_path} needs" in line
        and "1 MB are free" in line
    )


@pytest.mark.parametrize(
    ("number", "status"),
    [
        (signal.SIGTERM, 143),
        pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow),
        pytest.param(signal.SIGHUP, 129, marks=pytest.mark.slow),
    ],
)
def test_signals_leave_nothing_behind(number, status, tmp_path, monkeypatch, default_signals):
    def half(program: Any, path: Path) -> None:
        path.write_text("half")
        path.with_name(f"{path.name}.data").write_text("half")
        os.kill(os.getpid(), number)
        time.sleep(10)

    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGHUP)]
    monkeypatch.setattr(graphs, "trace", lambda *args: None)
    monkeypatch.setattr(graphs, "save_program", half)
    assert main(["export", "shvit_s1", "--size", "64", "--out", str(tmp_path / "x.pt2")]) == status
    assert list(tmp_path.iterdir()) == []
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGHUP)] == before
