"""The time to the first image is measured in separate processes and shown on a page."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"


@pytest.fixture
def cold_start(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(TOOLS))
    yield importlib.import_module("cold_start")
    for name in ("cold_start", "measuring"):
        sys.modules.pop(name, None)


def test_the_page_is_that_of_the_measurements(cold_start: ModuleType) -> None:
    report = json.loads(cold_start.OUTPUT.read_text())
    assert cold_start.PAGE.read_text() == cold_start.page(report)


def test_a_way_is_measured_anew_and_the_others_stay(
    cold_start: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environments: list[dict[str, str]] = []
    programs: list[str] = []

    def run(words: list[str], env: dict[str, str], **_: Any) -> Any:
        environments.append(env)
        programs.append(words[2])
        seconds = 3.0 if words[-1] == "fused" else 0.25
        return subprocess.CompletedProcess(words, 0, f"said\n[{seconds}, {2 * seconds}]\n")

    # The module's own, as others use subprocess, too.
    monkeypatch.setattr(cold_start, "subprocess", SimpleNamespace(run=run, PIPE=subprocess.PIPE))
    files = ["--output", str(tmp_path / "a.json"), "--page", str(tmp_path / "a.md")]
    for way in ("source", "wheel"):
        cold_start.main([way, "--models", "van_b0", *files])
    assert [bool(cold_start.WAYS[way][1]) for way in ("source", "wheel")] == [True, False]
    for found, of_wheel in zip(environments[1::2], (False, True), strict=True):
        assert ("PYTHONPATH" not in found) == of_wheel
        assert (found["PATH"] == found["VISION_BACKBONES_CACHE_DIR"]) == of_wheel
    assert ["'ziglang'] = None" in program for program in programs[::2]] == [False, True]
    rows = [line for line in (tmp_path / "a.md").read_text().splitlines() if "`van_b0`" in line]
    assert rows == [
        "| a wheel | `van_b0` | 0.25 | 3.00 | 6.00 |",
        "| source | `van_b0` | 0.25 | 3.00 | 6.00 |",
    ]
