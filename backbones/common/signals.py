"""Termination signals: recorded, so that a step is finished, or raised as an exception."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType


class StopRequest:
    """The number of the received ``signal``; 0 if there was none."""

    def __init__(self) -> None:
        self.signal = 0

    def note(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal; a second Ctrl-C stops immediately."""
        if number == signal.SIGINT and self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Record SIGINT, SIGTERM and SIGUSR1 (Slurm's warning) inside the block."""
    request = StopRequest()
    with handle_signals(("SIGINT", "SIGTERM", "SIGUSR1"), request.note):
        yield request


@contextmanager
def exit_on_signals() -> Iterator[None]:
    """Make SIGTERM and SIGHUP raise SystemExit (128 + signal), so that every ``finally`` runs."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    with handle_signals(("SIGTERM", "SIGHUP"), leave):
        yield


@contextmanager
def handle_signals(
    names: Iterable[str], handler: Callable[[int, FrameType | None], object]
) -> Iterator[None]:
    """Let ``handler`` handle the signals that exist on this system inside the block.

    Those that this process was started to ignore, as ``nohup`` does, are still ignored.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # Python lets only the main thread handle signals
        return
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    heeded = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, handler) for number in heeded}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
