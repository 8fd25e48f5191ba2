"""The shared code of the benchmarks."""

from __future__ import annotations

import importlib
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture
def measuring(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(TOOLS)
    return importlib.import_module("measuring")


def test_short_memory_peaks_are_measured(measuring: ModuleType) -> None:
    with measuring.PeakMemory(torch.device("cpu")) as memory:
        torch.ones(1 << 24)
    if sys.platform == "linux":
        assert 0.9 * (1 << 26) < memory.bytes < 1.5 * (1 << 26)
    else:
        assert memory.bytes is None


def test_what_counts_is_the_later_half_of_a_turn(measuring: ModuleType) -> None:
    calls = []

    def run() -> None:
        calls.append(0.05 if len(calls) < 2 else 0.02)
        time.sleep(calls[-1])

    times = measuring.steady(run, torch.device("cpu"), 0.12)
    assert len(calls) == 3 and len(times) == 2
    assert times[0] >= 0.05 and times[1] >= 0.02
    assert len(measuring.steady(run, torch.device("cpu"), 0.0)) == 1
