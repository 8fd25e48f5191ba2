"""Test commands respect time limits, leave no processes and show their output."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest
from commands import run

# Starts a child in a session of its own, like torchrun's, that keeps the streams open.
_WITH_A_CHILD = """
import pathlib, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"],
                         start_new_session=True)
pathlib.Path(sys.argv[1]).write_text(str(child.pid))
print("started", flush=True)
def linger():
    time.sleep(600)
{end}
"""


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(
    ("end", "expected"),
    [
        ("linger()", r"took more than 1.5 s\nstarted\n(.|\n)*in linger"),
        ("sys.exit('no')", "ended with 1\nstarted\nno"),
    ],
    ids=["hangs", "fails"],
)
def test_processes_are_ended_and_output_is_shown(tmp_path: Path, end: str, expected: str) -> None:
    started = time.monotonic()
    code = _WITH_A_CHILD.format(end=end)
    with pytest.raises(AssertionError, match=expected):
        run([sys.executable, "-c", code, tmp_path / "pid"], timeout=1.5)
    assert time.monotonic() - started < 30
    assert not _alive(int((tmp_path / "pid").read_text()))


def test_output_of_both_streams(tmp_path: Path) -> None:
    code = "import os, sys; print(os.getcwd()); print(os.environ['A'], file=sys.stderr)"
    said = run([sys.executable, "-c", code], timeout=60, cwd=tmp_path, env={"A": "b"})
    assert sorted(said.split()) == [os.fspath(tmp_path), "b"]
