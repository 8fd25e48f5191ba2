"""Times and memory of calls."""

from __future__ import annotations

import sys
import time

import torch

from backbones.cli import timing


def test_short_memory_peaks_are_measured():
    with timing.PeakMemory(torch.device("cpu")) as memory:
        torch.ones(1 << 24)
    if sys.platform == "linux":
        assert 0.9 * (1 << 26) < memory.bytes < 1.5 * (1 << 26)
    else:
        assert memory.bytes is None


def test_what_counts_is_the_later_half_of_a_turn(monkeypatch):
    now, taken = [0.0], iter([0.5, 0.5, 0.25, 0.25, 9.0, 7.0])
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def run() -> None:
        now[0] += next(taken)

    assert timing.steady(run, torch.device("cpu"), 1.5) == [0.25, 0.25]
    assert timing.steady(run, torch.device("cpu"), 9.0) == [7.0]  # of at least two
