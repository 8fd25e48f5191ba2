"""The measurement itself runs and writes what it found; its figures are for a quiet machine."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

PATH = Path(__file__).parents[2] / "tools" / "benchmark_training.py"


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(PATH.parent)
    spec = importlib.util.spec_from_file_location("benchmark_training", PATH)
    module = sys.modules["benchmark_training"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # timm leaves its files to the collector
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_it_measures_and_writes(tool, tmp_path, capsys):
    output = tmp_path / "training.json"
    words = ["--images=12", "--batch-size=4", "--workers=0", "--turns=2", "--steps=1"]
    words += ["--step-batch-size=2", "--step-size=32", "--device=cpu", f"--output={output}"]
    assert tool.main(words) in (0, 1)
    report = json.loads(output.read_text())
    assert report["loader"]["images"] == 12 and report["loader"]["ratio"] > 0
    assert report["machine"]["name"] and report["machine"]["threads"] >= 1
    assert report["step"]["ours_ms"] > 0 and report["step"]["ratio"] > 0
    assert "loader: " in capsys.readouterr().out
