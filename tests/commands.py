"""Run commands in tests, with a time limit; failures show the output."""

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

# Characters of a failing command's output that are shown, from the end.
SHOWN = 20_000


def run(
    command: Sequence[str | Path],
    timeout: float,
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
) -> str:
    """Run a command and return its output on both streams; leaves no process running.

    With ``subprocess.run``, torchrun's workers, which have sessions of their own, would survive a
    timeout and keep the pipe open, so that reading it would block forever. Here the output goes to
    a file, and all processes, identified by an environment variable, are killed. At a timeout,
    Python processes first print their stacks.

    Args:
        timeout: in seconds.
        env: further environment variables.

    Raises:
        AssertionError: the command failed or timed out; the message has the output.
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
    """Send a signal to every process with ``mark`` in its environment; returns their number.

    Args:
        pause: seconds to wait after each, so that their outputs are not interleaved.
    """
    found = 0
    for folder in Path("/proc").glob("[0-9]*"):
        # The environment of other users' and of ended processes cannot be read.
        with suppress(OSError):
            if mark.encode() in (folder / "environ").read_bytes():
                os.kill(int(folder.name), number)
                found += 1
                time.sleep(pause)
    return found
