"""Benchmarks of whole programs measure what they say and keep what they measured."""

from __future__ import annotations

import json
import platform
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest


def places(folder: Path) -> list[str]:
    return [f"--output={folder / 'a.json'}"]


def results_in(folder: Path) -> list[dict[str, Any]]:
    results: list[dict[str, Any]] = json.loads((folder / "a.json").read_text())["results"]
    return results


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # timm leaves its files to the collector
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_the_training_code_is_measured(tool, tmp_path):
    output = tmp_path / "training.json"
    words = ["--images=12", "--batch-size=4", "--workers=0", "--turns=2", "--steps=1"]
    words += ["--step-batch-size=2", "--step-size=32", "--device=cpu", f"--output={output}"]
    assert tool.training(words) in (0, 1)
    report = json.loads(output.read_text())
    assert report["loader"]["images"] == 12 and report["loader"]["ratio"] > 0
    assert report["machine"]["name"] and report["machine"]["threads"] >= 1
    assert report["step"]["ours_ms"] > 0 and report["step"]["ratio"] > 0


def test_a_way_is_measured_anew_and_the_others_stay(tool, tmp_path, monkeypatch):
    environments: list[dict[str, str]] = []
    programs: list[str] = []

    def run(words: list[str], env: dict[str, str], **_: Any) -> Any:
        environments.append(env)
        programs.append(words[2])
        seconds = 3.0 if words[-1] == "fused" else 0.25
        return subprocess.CompletedProcess(words, 0, f"said\n[{seconds}, {2 * seconds}]\n")

    # The module's own, as others use subprocess, too.
    monkeypatch.setattr(tool, "subprocess", SimpleNamespace(run=run, PIPE=subprocess.PIPE))
    for way in ("source", "wheel"):
        tool.cold_start([way, "--models", "van_b0", *places(tmp_path)])
    assert [tool.WAYS[way] for way in ("source", "wheel")] == [True, False]
    for found, of_wheel in zip(environments[1::2], (False, True), strict=True):
        assert ("PYTHONPATH" not in found) == of_wheel
        assert (found["PATH"] == found["VISION_BACKBONES_CACHE_DIR"]) == of_wheel
    assert ["'ziglang'] = None" in program for program in programs[::2]] == [False, True]
    rows = [(row["way"], row["plain"]["seconds"], row["fused"]) for row in results_in(tmp_path)]
    fused = {"seconds": 3.0, "cpu_seconds": 6.0}
    assert rows == [("source", 0.25, fused), ("wheel", 0.25, fused)]


def test_the_cost_of_guards_is_measured(tool, tmp_path):
    tool.guards(["--calls=20", "--rounds=1", "--model=test_resnet", *places(tmp_path)])
    (row,) = results_in(tmp_path)
    assert row["python"] == platform.python_version() and row["model"] == "timm/test_resnet"
    assert abs(row["guards_us"]) < 1e3 * row["call_ms"]  # which a busy machine may turn around
