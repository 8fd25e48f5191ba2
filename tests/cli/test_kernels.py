"""``summary --kernels``: the table, JSON and the memory plot."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from compiled_kernels import without_kernels
from PIL import Image
from zoo import small

from backbones.cli.main import main
from backbones.common.dtypes import check_dtype
from backbones.common.errors import CommandError
from ops.cpu import bfloat16, policy
from ops.cpu.gemm.int8 import not_faster_in_int8


@pytest.fixture(autouse=True)
def shallow(monkeypatch: pytest.MonkeyPatch) -> None:
    """VAN-B0 with few blocks."""
    monkeypatch.setattr("backbones.cli.summary.create", lambda name: small("van").eval())


def _said(words: Sequence[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["summary", "van_b0", "--kernels", "--runs", "1", *words]) == 0
    return capsys.readouterr().out


def test_the_table_is_of_the_fused_model(capsys):
    said = _said(["--size", "64", "48", "--batch", "2"], capsys)
    assert said.startswith("van_b0, fused: 2×3×64×48 float32, ")
    assert "packed_linear" in said and "linear_by_kernel: rows" in said


def test_plain(capsys):
    said = _said(["--size", "64", "--plain"], capsys)
    assert said.startswith("van_b0, not fused: 1×3×64×64 float32, ")
    assert "torch conv2d" in said and "packed_linear" not in said


def test_int8(capsys, monkeypatch):
    for name in ("_FEWEST_IN_INT8", "_FEWEST_IN_INT8_OF_TILES"):
        monkeypatch.setattr(policy, name, 1)
    words = ["--size", "64", "--dtype", "int8"]
    if not_faster_in_int8(torch.device("cpu")) is None:
        said = _said(words, capsys)
        assert (
            re.search(r"packed_linear .* int8 ", said)
            and " layers in int8 (a range for each" in said
        )
        assert "linear_in_int8: chosen by fuse(int8), " in said
    without_kernels(monkeypatch)
    assert main(["summary", "van_b0", "--kernels", *words]) == 2
    assert "--dtype int8: switched off" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_dtype_that_this_cpu_is_faster_in(dtype, capsys, monkeypatch):
    monkeypatch.setattr(bfloat16, "faster_dtype", lambda: dtype)
    told = json.loads(_said(["--size", "64", "--json", "--dtype", "auto"], capsys))
    assert f"torch.{told['dtype']}" == str(dtype)
    assert f"torch.{check_dtype('auto', torch.device('cpu'))}" == str(dtype)
    with pytest.raises(CommandError, match="--dtype auto is for CPUs; GPUs support float16"):
        check_dtype("auto", torch.device("cuda"))


def test_json(capsys):
    told = json.loads(_said(["--size", "64", "--json", "--dtype", "bfloat16"], capsys))
    assert told["format"] == 1 and told["dtype"] == "bfloat16" and told["is_fused"]
    assert [call["layer"] for call in told["calls"]][-1] == "head.fc"


def test_the_picture_of_the_memory(tmp_path, capsys):
    """A rectangle of its own colour a buffer."""
    _said(["--size", "64", "--plot", str(tmp_path / "memory.png")], capsys)
    pixels = np.asarray(Image.open(tmp_path / "memory.png").convert("RGB"))
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50


def test_without_kernels_there_is_no_plan(tmp_path, monkeypatch, capsys):
    without_kernels(monkeypatch)
    words = ["summary", "van_b0", "--kernels", "--size", "64", "--runs", "1"]
    assert main([*words, "--plot", str(tmp_path / "x.png")]) == 2
    said = capsys.readouterr()
    assert "no memory plan, because van_b0 is not replayed: switched off by" in said.err
    assert not list(tmp_path.iterdir())
    assert main(words) == 0
    assert "torch conv2d" in capsys.readouterr().out
