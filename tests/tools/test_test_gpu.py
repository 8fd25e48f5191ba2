"""`make test-gpu`: what it does with a GPU's time, and without a GPU."""

from __future__ import annotations

import importlib
import json
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch
from fresh_python import run_code

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(TOOLS)
    return importlib.import_module("test_gpu")


def test_says_that_there_is_no_gpu(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    output = tmp_path / "gpu.json"
    assert tool.main(["--output", str(output)]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "No GPU that torch can use: nothing was tested."
    assert json.loads(output.read_text()) == {"machine": None, "cases": {}, "benchmark": []}


CASES = """
import pytest

@pytest.mark.slow
def test_slow():
    assert order == ["quick"]

order = []

def test_quick():
    order.append("quick")

@pytest.mark.parametrize("i", range(3))
def test_wrong(i):
    assert i != 1
"""


RUN = """
import json, sys, time
from pathlib import Path

sys.path.insert(0, {tools!r})
import test_gpu, torch

found = [
    test_gpu.run_cases(Path(file), time.monotonic() + float(seconds))
    for file, seconds in zip(sys.argv[1::2], sys.argv[2::2])
]
assert not torch.are_deterministic_algorithms_enabled()
print(json.dumps(found))
"""


def test_counts_cases(tmp_path: Path) -> None:
    """All of them with the quick ones first; none when the time is over; a file without cases."""
    files = [tmp_path / f"{name}_triton_cases.py" for name in ("some", "late", "empty")]
    for file, text in zip(files, (CASES, CASES, "import nothing_of_that_name"), strict=True):
        file.write_text(text)
    words = [str(files[0]), "60", str(files[1]), "-1", str(files[2]), "60"]
    said = run_code(RUN.format(tools=str(TOOLS)), tmp_path, *words)
    some, late, empty = json.loads(said.splitlines()[-1])
    assert (some["passed"], some["not_run"]) == (4, 0)
    assert [name.rpartition("::")[2] for name in some["failed"]] == ["test_wrong[1]"]
    assert (late["passed"], late["failed"], late["not_run"]) == (0, [], 5)
    assert empty["failed"]


def test_tests_and_measures_within_the_time(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """As on a GPU, but for the machine, the cases and the measurements."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tool, "machine", lambda device: {"name": "a GPU"})
    deadlines = []

    def run_cases(file: Path, deadline: float) -> dict:
        assert file.exists()
        deadlines.append(deadline - time.monotonic())
        return {"passed": 2, "failed": ["x"] if "bi_wkv" in str(file) else [], "not_run": 1}

    def measure(setting, batch, dtype, backward, names, device, effort, expected) -> dict:
        assert device.type == "cuda"
        return {"setting": setting.name, "contenders": {"flex": {"skipped": "no"}}}

    monkeypatch.setattr(tool, "run_cases", run_cases)
    monkeypatch.setattr(tool, "measure", measure)
    output = tmp_path / "gpu.json"
    assert tool.main(["--output", str(output), "--minutes", "6"]) == 1
    report = json.loads(output.read_text())
    assert {Path(name).parent.name for name in report["cases"]} == {
        "bi_wkv",
        "linear_attention",
        "neighborhood",
    }
    assert len(deadlines) == 4
    assert all(0 < seconds <= 240 for seconds in deadlines)
    assert [row["setting"] for row in report["benchmark"]] == [row[0] for row in tool.ROWS]
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "a GPU: 8 cases passed, 1 failed, 4 not run; 6 of 6 benchmark rows."
    tool.main(["--output", str(output), "--minutes", "0.5"])
    assert json.loads(output.read_text())["benchmark"] == []
