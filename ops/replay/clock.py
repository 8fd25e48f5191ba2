"""The clock for timing calls."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

__all__ = ["clock"]

_RESOLUTION = 1e-6  # required resolution of the clock, in seconds


def clock() -> Callable[[], float]:
    """A function that returns the time in seconds, suited to torch's current number of threads.

    With a single thread, which never waits for others, this is the thread's CPU time, so other
    processes on a busy machine do not affect it. Otherwise it is wall-clock time.
    """
    fine = time.get_clock_info("thread_time").resolution <= _RESOLUTION
    return time.thread_time if fine and torch.get_num_threads() == 1 else time.perf_counter
