"""What commands show of their progress, on terminals and elsewhere."""

from __future__ import annotations

import io
import sys
import time

import pytest

from backbones.common.progress import Progress, counting


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_elsewhere_there_are_lines_or_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    for active in (True, False):
        stream = io.StringIO()
        progress = Progress(active, stream, seconds_between_lines=0.0)
        progress.begin("rows", 30, done=10)
        progress.step("first", count=5)
        progress.say("a line")
        progress.end()
        assert stream.getvalue() == ("rows  15/30  first\na line\n" if active else "")
    with counting("rows", 30) as bar:
        bar.step(count=30)
    assert capsys.readouterr() == ("", "")


def test_the_time_left_is_of_the_steps_of_this_run(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    progress = Progress(stream=io.StringIO())
    progress.begin("rows", 30, done=10)
    now[0] += 8
    progress.step(count=4)
    assert progress.seconds_left() == 32


def test_a_terminal_has_a_bar(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with counting("rows", 30) as bar:
        bar.pause = 0.0
        bar.step(count=12)
    assert "rows  40%" in sys.stderr.getvalue() and "12/30" in sys.stderr.getvalue()
    with counting("others", 30, shown=False) as bar:
        bar.step(count=12)
    assert "others" not in sys.stderr.getvalue()
