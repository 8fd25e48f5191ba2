"""A progress bar for counted steps."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import Any, TextIO

from tqdm import tqdm

_BAR = "{desc} {percentage:3.0f}% {bar} {n}/{total}  {postfix}"


class Progress:
    """A progress bar on a terminal (default: standard output); elsewhere, occasional lines.

    Nothing is shown unless ``active``. ``done`` counts the steps so far.
    """

    def __init__(
        self, active: bool = True, stream: TextIO | None = None, seconds_between_lines: float = 10.0
    ) -> None:
        self.stream = stream or sys.stdout
        self.active = active
        self.live = self.active and self.stream.isatty()
        self.pause = 0.2 if self.live else seconds_between_lines
        self._bar: Any = None
        self._title, self._total, self.done, self._first = "", 0, 0, 0
        self._begun = self._shown = time.monotonic()

    def say(self, text: str) -> None:
        """Print a line, above the bar if there is one."""
        if self.active:
            tqdm.write(text, file=self.stream)
            self.stream.flush()

    def begin(self, title: str, total: int, done: int = 0) -> None:
        """Start a bar of ``total`` steps."""
        self.end()
        self._title, self._total, self.done = title, total, done
        self._first, self._begun = done, time.monotonic()
        if self.live:
            self._bar = tqdm(
                total=total,
                initial=done,
                desc=title,
                bar_format=_BAR,
                file=self.stream,
                leave=False,
                dynamic_ncols=True,
                mininterval=0.0,
            )

    def due(self) -> bool:
        """Whether an update of the metrics is due, which synchronises with the GPU."""
        return self.active and time.monotonic() - self._shown >= self.pause

    def show(self, done: int, text: str) -> None:
        """Move the bar to ``done`` and set the text next to it."""
        self.done, self._shown = done, time.monotonic()
        if self._bar is not None:
            self._bar.n = done
            self._bar.set_postfix_str(text, refresh=True)
        elif self.active:
            self.say(f"{self._title}  {done}/{self._total}  {text}")

    def step(self, text: str = "", count: int = 1) -> None:
        """Add to the count, and show it if that is due."""
        self.done += count
        if self.due():
            self.show(self.done, text)

    def seconds_left(self) -> float:
        """Until all steps are done, at the speed so far."""
        seconds = time.monotonic() - self._begun
        return seconds / max(self.done - self._first, 1) * (self._total - self.done)

    def end(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


@contextlib.contextmanager
def counting(title: str, total: int, shown: bool = True) -> Iterator[Progress]:
    """A bar on standard error, if that is a terminal; :meth:`Progress.step` moves it."""
    progress = Progress(shown and sys.stderr.isatty(), sys.stderr)
    progress.begin(title, total)
    try:
        yield progress
    finally:
        progress.end()


def duration(seconds: float) -> str:
    """``75`` as ``1:15``, ``7384`` as ``2:03:04``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
