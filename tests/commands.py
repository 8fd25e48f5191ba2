"""Commands for the tests: none outlives its time, and one that fails shows what it printed."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

# So much of what a failing command printed is shown, in characters before the end.
SHOWN = 20_000


def run(
    command: Sequence[str | Path],
    timeout: float,
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
) -> str:
    """What the command prints, on both streams; nothing that it started is left at the end.

    Not as ``subprocess.run``: torchrun's workers have sessions of their own, survive it when a time
    limit ends it, and hold on to a pipe that one would then read for ever. Here the output goes to
    a file, and the end comes to all of them, known by an environment variable. At a time limit
    those in Python first say where they are.

    Args:
        timeout: in seconds.
        env: further environment variables.

    Raises:
        AssertionError: the command failed or took longer; with what was printed.
    """
    mark = f"STARTED_BY_TEST={uuid.uuid4()}"
    name, value = mark.split("=")
    talkative = {"PYTHONFAULTHANDLER": "1", "PYTHONUNBUFFERED": "1"}
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=cwd,
            env={**os.environ, **talkative, **(env or {}), name: value},
        )
        end = f"took more than {timeout} s"
        try:
            end = f"ended with {process.wait(timeout)}"
        except subprocess.TimeoutExpired:
            _signal(mark, signal.SIGABRT, pause=0.5)
        finally:
            while _signal(mark, signal.SIGKILL):
                process.poll()
                time.sleep(0.01)
            process.wait()
        output.seek(0)
        said = output.read()
    assert end == "ended with 0", f"{' '.join(map(str, command))} {end}\n{said[-SHOWN:]}"
    return said


def _signal(mark: str, number: signal.Signals, pause: float = 0.0) -> int:
    """Send a signal to every process with ``mark`` in its environment; how many there were.

    Args:
        pause: after each, in seconds: what they print shall not be mixed.
    """
    found = 0
    for folder in Path("/proc").glob("[0-9]*"):
        # Of others' and of ended processes nothing is read.
        with suppress(OSError):
            if mark.encode() in (folder / "environ").read_bytes():
                os.kill(int(folder.name), number)
                found += 1
                time.sleep(pause)
    return found
