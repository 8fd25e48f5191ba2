"""Times and memory of calls."""

from __future__ import annotations

import sys
import time

import torch

from backbones.cli import timing


def test_short_memory_peaks_are_measured() -> None:
    with timing.PeakMemory(torch.device("cpu")) as memory:
        torch.ones(1 << 24)
    if sys.platform == "linux":
        assert 0.9 * (1 << 26) < memory.bytes < 1.5 * (1 << 26)
    else:
        assert memory.bytes is None


def test_what_counts_is_the_later_half_of_a_turn() -> None:
    calls = []

    def run() -> None:
        calls.append(0.05 if len(calls) < 2 else 0.02)
        time.sleep(calls[-1])

    times = timing.steady(run, torch.device("cpu"), 0.12)
    assert len(calls) == 3 and len(times) == 2
    assert times[0] >= 0.05 and times[1] >= 0.02
    assert len(timing.steady(run, torch.device("cpu"), 0.0)) == 1
