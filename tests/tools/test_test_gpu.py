"""`make test-gpu`: what it does with a GPU's time, and without a GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch


def test_says_that_there_is_no_gpu(tool, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    output = tmp_path / "gpu.json"
    assert tool.main(["--output", str(output)]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "No GPU that torch can use: nothing was tested."
    empty = {"format": 1, "machine": None, "cases": {}, "benchmark": []}
    assert json.loads(output.read_text()) == empty


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


@pytest.mark.parametrize(
    ("text", "seconds", "counts"),
    [
        pytest.param(CASES, 60, (4, 1, 0), marks=pytest.mark.slow),
        pytest.param(CASES, 0, (0, 0, 5), marks=pytest.mark.slow),
        pytest.param("import nothing_of_that_name", 60, (0, 1, 0), marks=pytest.mark.slow),
        ("import time\ntime.sleep(30)\n", 0, (0, 1, 0)),
    ],
    ids=["all", "late", "broken", "hanging"],
)
def test_counts_cases(tool, tmp_path, text, seconds, counts, monkeypatch):
    """All of them with the quick ones first; none when the time is over."""
    if "sleep" in text:
        monkeypatch.setattr(tool, "SECONDS_OF_A_CASE", 0.5)
    file = tmp_path / "some_triton_cases.py"
    file.write_text(text)
    found = tool.run_cases(file, seconds)
    assert (found["passed"], len(found["failed"]), found["not_run"]) == counts
    if counts[1]:
        ends = {4: "test_wrong[1]", 0: "a case that did not end" if "sleep" in text else ""}
        assert found["failed"][0].endswith(ends[counts[0]])


def test_tests_and_measures_within_the_time(tool, tmp_path, monkeypatch, capsys):
    """As on a GPU, but for the machine, the cases and the measurements."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tool, "machine", lambda device: {"name": "a GPU"})
    given: list[float] = []

    def run_cases(file: Path, seconds: float) -> dict:
        assert file.exists()
        given.append(seconds)
        return {"passed": 2, "failed": ["x"] if "neighborhood" in str(file) else [], "not_run": 1}

    def measure(setting, batch, dtype, backward, names, device, effort, expected) -> dict:
        assert device.type == "cuda"
        return {"setting": setting.name, "contenders": {"flex": {"skipped": "no"}}}

    monkeypatch.setattr(tool, "run_cases", run_cases)
    monkeypatch.setattr(tool, "measure", measure)
    output = tmp_path / "gpu.json"
    assert tool.main(["--output", str(output), "--minutes", "6"]) == 1
    report = json.loads(output.read_text())
    assert {Path(name).parent.name for name in report["cases"]} == {"ops", "neighborhood"}
    assert len(given) == 2
    assert all(0 < seconds <= 240 for seconds in given)
    assert [row["setting"] for row in report["benchmark"]] == [row[0] for row in tool.ROWS]
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "a GPU: 4 cases passed, 1 failed, 2 not run; 6 of 6 benchmark rows."
    tool.main(["--output", str(output), "--minutes", "0.5"])
    assert json.loads(output.read_text())["benchmark"] == []
