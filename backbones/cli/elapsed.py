"""A status line for long steps."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterator

__all__ = ["show_elapsed"]

_CLEAR_LINE = "\r\x1b[K"


@contextlib.contextmanager
def show_elapsed(step: str, interval: float = 1.0) -> Iterator[None]:
    """Show a step's elapsed seconds if standard error is a terminal, and clear the line at the end.

    Args:
        interval: seconds between updates.
    """
    if not sys.stderr.isatty():
        yield
        return
    stream, start, done = sys.stderr, time.monotonic(), threading.Event()

    def tick() -> None:
        while not done.wait(interval):
            stream.write(f"{_CLEAR_LINE}{step}, {time.monotonic() - start:.0f} s")
            stream.flush()

    thread = threading.Thread(target=tick, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        stream.write(_CLEAR_LINE)
        stream.flush()
