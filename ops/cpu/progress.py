"""The progress display of kernel compilation."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from types import TracebackType

__all__ = ["Progress"]

_log = logging.getLogger(__name__)

_CLEAR_LINE = "\r\x1b[K"
_BAR = 24
# Without a terminal, a longer wait (in seconds) is logged.
_LONG_S = 5.0


class Progress:
    """A bar on standard error if that is a terminal, else one warning if compilation is slow.

    Args:
        weights: the approximate compile time of each kernel, in arbitrary units.
        isa: the instruction set.
        folder: where the libraries are kept.
    """

    def __init__(self, weights: Mapping[str, float], isa: str, folder: Path) -> None:
        self._weights, self._whole = weights, sum(weights.values())
        count = f"{len(weights)} C++ kernel{'s' if len(weights) > 1 else ''}"
        self._text = (
            f"Compiling {count} for {isa}, as none came with the package: once, then "
            f"they are kept in {str(folder)!r}. Ahead of time: vision-backbones build; never: "
            "VISION_BACKBONES_NATIVE=0"
        )
        self._is_drawn = sys.stderr is not None and sys.stderr.isatty()

    def __enter__(self) -> Progress:
        self._start, self._logged = time.monotonic(), False
        if self._is_drawn:
            sys.stderr.write(f"{self._text}\n")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._is_drawn:
            took = f"{time.monotonic() - self._start:.0f} s"
            sys.stderr.write(_CLEAR_LINE + ("" if error else f"Compiled in {took}.\n"))
            sys.stderr.flush()

    def show(self, done: Collection[str], running: Collection[str]) -> None:
        """Redraw the bar.

        Args:
            done, running: names of kernels.
        """
        seconds = time.monotonic() - self._start
        if self._is_drawn:
            sys.stderr.write(_CLEAR_LINE + self._bar(done, running, seconds))
            sys.stderr.flush()
        elif seconds >= _LONG_S and not self._logged:
            self._logged = True
            _log.warning("%s", self._text)

    def _bar(self, done: Collection[str], running: Collection[str], seconds: float) -> str:
        share = sum(self._weights[name] for name in done) / self._whole
        filled = round(_BAR * share)
        left = f", {seconds / share - seconds:.0f} s left" if 0 < share < 1 else ""
        names = ", ".join(running)
        return (
            f"[{'#' * filled}{'.' * (_BAR - filled)}] {len(done)}/{len(self._weights)}, "
            f"{seconds:.0f} s{left}: {names}"
        )[:79]
