"""Failed exports print one line and leave no files."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from faults import files_that_may_not_grow
from torch import Tensor, nn

from backbones.cli import graphs
from backbones.cli.export import export
from backbones.cli.main import main
from backbones.common.errors import FileError
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


@pytest.mark.parametrize("ending", ["onnx", "pt2"])
def test_files_larger_than_the_limit(ending, tmp_path):
    path = tmp_path / f"x.{ending}"
    path.write_text("as it was")
    said = f"cannot write {path}: `ulimit -f` or the file"
    with files_that_may_not_grow(2000), pytest.raises(FileError, match=said):
        export(Loaded(Plain().eval(), "plain"), path, ending, [(1, 3, 16, 16)])
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert path.read_text() == "as it was"


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
