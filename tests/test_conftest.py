"""What tests/conftest.py does for every test: signals, and packages that are missing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

_TESTS = Path(__file__).parent
_FILE = """
import os, signal, subprocess, sys
import pytest

def test_started_processes_have_the_default_handlers():
    code = "import signal as s; print(*[s.getsignal(n).value for n in (s.SIGTERM, s.SIGHUP)])"
    code += "; assert s.getsignal(s.SIGINT) is s.default_int_handler"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout == "0 0\\n"

def test_this_process_goes_on_ignoring():
    os.kill(os.getpid(), signal.SIGHUP)
    os.kill(os.getpid(), signal.SIGINT)

def test_one_that_sends_itself_signals(default_signals):
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_DFL

@pytest.fixture
def browser():
    raise AssertionError

def test_of_a_page(browser):
    pass

@pytest.mark.needs("arm_compiler", "emulator")
@pytest.mark.parametrize("kernel", [1, 2])
def test_of_a_kernel(kernel):
    raise AssertionError
"""


def _ignore_signals() -> None:
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


@pytest.mark.parametrize("workers", [[], ["-n1"]], ids=["alone", "in a worker"])
def test_under_nohup_and_without_debians_packages(workers: list[str], tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(_FILE)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = needs\n")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "conftest", *workers],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(_TESTS), "PATH": str(tmp_path)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        preexec_fn=_ignore_signals,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1].startswith("3 passed")
    assert lines[-3:-1] == [
        "LEFT OUT: 1 tests that need Debian's packages chromium chromium-driver, which are missing",
        "LEFT OUT: 2 tests that need Debian's packages g++-aarch64-linux-gnu qemu-user, which are "
        "missing",
    ]
