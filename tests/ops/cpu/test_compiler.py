"""Running the compiler: failure messages and cleanup."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ops.cpu import compiler


def script(folder: Path, text: str) -> list[str]:
    path = folder / "compiler"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return [str(path)]


def scratch(folder: Path) -> Path:
    made = folder / "scratch"
    made.mkdir()
    return made


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        ("error: unrecognized command-line option '-mamx-tile'", compiler.RefusedError),
        ("small.cpp:1:1: error: 'this' does not name a type", compiler.RefusedError),
        ("c++: fatal error: Killed signal terminated program cc1plus", compiler.CompilerError),
        ("collect2: fatal error: ld terminated with signal 9 [Killed]", compiler.CompilerError),
        ("cc1plus: out of memory allocating 65536 bytes", compiler.CompilerError),
        ("/tmp/x.s: No space left on device", OSError),
        ("final link failed: Disk quota exceeded", OSError),
    ],
)
def test_failure_messages(said: str, kind: type[Exception], tmp_path: Path) -> None:
    words = script(tmp_path, f'echo "{said}" >&2; exit 1')
    with pytest.raises(kind) as caught:
        compiler.run(words, scratch(tmp_path))
    assert type(caught.value) is kind
    if kind is OSError:
        assert caught.value.errno == errno.ENOSPC
        assert caught.value.filename == str(tmp_path)
        assert caught.value.strerror in said
    else:
        assert said in str(caught.value)


def test_a_linker_killed_by_a_full_disk(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(compiler, "_LEAST_BYTES", 1 << 62)
    with pytest.raises(OSError, match="No space left"):
        compiler.run(script(tmp_path, "exit 1"), scratch(tmp_path))


def test_unwritable_output_is_not_a_rejection(tmp_path: Path) -> None:
    folder = scratch(tmp_path)
    words = script(tmp_path, f"rmdir '{folder}'; echo 'error: cannot open output file' >&2; exit 1")
    with pytest.raises(FileNotFoundError):
        compiler.run(words, folder)


def test_not_a_compiler(tmp_path: Path) -> None:
    words = script(tmp_path, "")
    Path(words[0]).write_bytes(b"\0\0")
    with pytest.raises(compiler.RefusedError, match="Exec format error"):
        compiler.run(words, tmp_path)
    Path(words[0]).unlink()
    with pytest.raises(compiler.RefusedError, match="No such file"):
        compiler.run(words, tmp_path)


def test_a_killed_compiler(tmp_path: Path) -> None:
    with pytest.raises(compiler.CompilerError, match="status -9"):
        compiler.run(script(tmp_path, "kill -9 $$"), scratch(tmp_path))


def test_messages_of_any_encoding(tmp_path: Path) -> None:
    with pytest.raises(compiler.RefusedError, match="error: \ufffd"):
        compiler.run(script(tmp_path, r"printf 'error: \377' >&2; exit 1"), scratch(tmp_path))


def test_temporary_files_go_to_the_scratch_folder(tmp_path: Path) -> None:
    folder = scratch(tmp_path)
    compiler.run(script(tmp_path, 'echo x > "$TMPDIR/left.s"'), folder)
    assert [path.name for path in folder.iterdir()] == ["left.s"]


def test_a_hung_compiler_is_killed_with_its_children(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(compiler, "_TIMEOUT_S", 0.3)
    words = script(tmp_path, f"sleep 60 & echo $! > '{tmp_path}/pid'; wait")
    with pytest.raises(compiler.CompilerError, match="did not end within"):
        compiler.run(words, scratch(tmp_path))
    _gone(tmp_path / "pid")


def _gone(file: Path) -> None:
    pid = int(file.read_text())
    deadline = time.monotonic() + 10
    while is_alive(pid):
        assert time.monotonic() < deadline
        time.sleep(0.01)


# The module alone, without torch: quicker.
_RUN = """
import importlib.util, sys, tempfile
from pathlib import Path
spec = importlib.util.spec_from_file_location("compiler", sys.argv[1])
compiler = importlib.util.module_from_spec(spec)
spec.loader.exec_module(compiler)
with compiler.unwinding_on_signals(), tempfile.TemporaryDirectory(dir=sys.argv[2]) as scratch:
    compiler.run(sys.argv[3:], Path(scratch))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_stops_the_compiler_and_cleans_up(number: int, tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    words = script(tmp_path, f"sleep 60 & echo $! > '{pid}.new'; mv '{pid}.new' '{pid}'; wait")
    made = tmp_path / "made"
    made.mkdir()
    command = [sys.executable, "-c", _RUN, compiler.__file__, str(made), *words]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            deadline = time.monotonic() + 60
            while not pid.exists():
                assert time.monotonic() < deadline and process.poll() is None
                time.sleep(0.01)
            assert list(made.iterdir())
            process.send_signal(number)
            _, said = process.communicate(timeout=60)
        finally:
            process.kill()
            if pid.exists():
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(os.getpgid(int(pid.read_text())), signal.SIGKILL)
    # Whoever waits sees that it was the signal.
    assert process.returncode == -number
    assert number == signal.SIGINT or not said
    assert not list(made.iterdir())
    _gone(pid)


def test_a_signal_that_comes_while_the_compiler_starts(
    tmp_path: Path, monkeypatch, default_signals: None
) -> None:
    """It is known already, and is ended."""
    started = []
    real = compiler._start

    def start(words: list[str], folder: Path) -> subprocess.Popen[str]:
        started.append(real(words, folder))
        signal.raise_signal(signal.SIGINT)
        return started[0]

    monkeypatch.setattr(compiler, "_start", start)
    with pytest.raises(KeyboardInterrupt), compiler.unwinding_on_signals():
        compiler.run(script(tmp_path, "exec sleep 60"), scratch(tmp_path))
    assert started[0].returncode == -signal.SIGKILL
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_programs_signal_handlers_are_kept(monkeypatch) -> None:
    seen = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    try:
        with compiler.unwinding_on_signals():
            os.kill(os.getpid(), signal.SIGTERM)
        assert seen == [signal.SIGTERM]
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        with compiler.unwinding_on_signals():
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as inherited
        with compiler.unwinding_on_signals():
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
