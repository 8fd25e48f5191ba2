"""The clock that calls are timed with."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

__all__ = ["clock"]

_FINE = 1e-6  # seconds, that a clock must be able to tell apart


def clock() -> Callable[[], float]:
    """What tells the time in seconds, for calls by as many threads as torch has now.

    With a single thread, which never waits for another, it is the time that the CPU gave to it:
    what other processes take of a busy machine does not count.
    """
    fine = time.get_clock_info("thread_time").resolution <= _FINE
    return time.thread_time if fine and torch.get_num_threads() == 1 else time.perf_counter
