"""What benchmarks share measures what it says."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture
def measuring(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(TOOLS)
    return importlib.import_module("measuring")


def test_sees_memory_that_is_held_for_a_moment(measuring: ModuleType) -> None:
    with measuring.PeakMemory(torch.device("cpu")) as memory:
        torch.ones(1 << 24)
    if sys.platform == "linux":
        assert 0.9 * (1 << 26) < memory.bytes < 1.5 * (1 << 26)
    else:
        assert memory.bytes is None
