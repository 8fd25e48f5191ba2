"""Missing kernels are compiled together, and the wait is announced."""

from __future__ import annotations

import errno
import io
import logging
import os
import signal
import threading
import time
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from ops import cpu
from ops.cpu import batch, build, cache, compiler, libraries, progress
from ops.cpu.progress import Progress

_NAMES = ["a", "b", "c", "small"]


@pytest.fixture
def four(sources: Path) -> Path:
    """Three more kernels."""
    for name in _NAMES[:3]:
        (sources / "any" / f"{name}.cpp").write_text('extern "C" int answer() { return 42; }\n')
    return sources


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def _kept() -> list[str]:
    return sorted(path.name.partition("-")[0] for path in cpu.cache_dir().glob("*.so"))


def test_the_first_kernel_compiles_the_others(four, compilations) -> None:
    assert cpu.load("b").answer() == 42
    assert _kept() == _NAMES
    assert len(compilations) == 4
    for name in _NAMES:
        assert cpu.load(name).answer() == 42
    assert len(compilations) == 4


def test_plain_layers_kernels_compile_alone(four, compilations, monkeypatch) -> None:
    monkeypatch.setattr(build, "_OF_PLAIN_LAYERS", {"a", "b"})
    assert cpu.load("a").answer() == 42
    assert _kept() == ["a", "b"]
    assert cpu.load("c").answer() == 42
    assert _kept() == _NAMES
    assert len(compilations) == 4


def test_those_of_plain_layers_exist() -> None:
    assert not (build._OF_PLAIN_LAYERS | build._ALONE).difference(build.sources())


def test_one_compilation_per_cpu(four, compilations, monkeypatch) -> None:
    monkeypatch.setattr(batch, "_cpus", lambda: 2)
    at_work, most, lock, compile_ = 0, 0, threading.Lock(), compiler.run

    def run(words: list[str], scratch: Path) -> None:
        nonlocal at_work, most
        with lock:
            at_work += 1
            most = max(most, at_work)
        time.sleep(0.05)
        compile_(words, scratch)
        with lock:
            at_work -= 1

    monkeypatch.setattr(compiler, "run", run)
    assert cpu.load("a").answer() == 42
    assert most == 2


def test_a_failed_kernel_does_not_stop_the_others(four, caplog) -> None:
    (four / "any" / "b.cpp").write_text("this is not C++\n")
    assert cpu.load("a").answer() == 42
    assert _kept() == ["a", "c", "small"]
    assert cpu.load("c").answer() == 42
    assert cpu.load("b") is None
    assert "error" in cpu.unavailable_reason("b")


def test_rejected_sources_are_not_retried(four, monkeypatch) -> None:
    attempts = []

    def refuse(words: list[str], scratch: Path) -> None:
        attempts.append(words)
        raise compiler.RefusedError("error: no")

    monkeypatch.setattr(compiler, "run", refuse)
    monkeypatch.setattr(build, "_compilers", lambda: [["c++"]])
    monkeypatch.setenv("VISION_BACKBONES_NATIVE_ISA", "portable")
    assert [cpu.load(name) for name in _NAMES] == [None] * 4
    assert len(attempts) == 4


def test_a_signal_stops_all_compilers(four, compilations, monkeypatch, default_signals) -> None:
    running = threading.Barrier(3)

    def run(words: list[str], scratch: Path) -> None:
        running.wait(10)
        if not compiler.stopped.wait(10):
            raise AssertionError("it was not ended")
        raise compiler.CompilerError("c++ failed with status -9: ")

    def interrupt() -> None:
        running.wait(10)
        os.kill(os.getpid(), signal.SIGINT)

    works = compiler.run
    monkeypatch.setattr(batch, "_cpus", lambda: 2)
    monkeypatch.setattr(compiler, "run", run)
    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        cpu.load("a")
    thread.join()
    assert {path.suffix for path in cpu.cache_dir().iterdir()} == {".lock"}
    monkeypatch.setattr(compiler, "run", works)  # as where one goes on in a notebook
    assert cpu.load("a").answer() == 42


def test_a_signal_while_threads_start(four, monkeypatch, default_signals) -> None:
    """All of them end before ``load`` does."""
    running, ended, start = threading.Barrier(3), [], threading.Thread.start

    def run(words: list[str], scratch: Path) -> None:
        running.wait(10)
        assert compiler.stopped.wait(10)
        time.sleep(0.2)
        ended.append(scratch)
        raise compiler.CompilerError("c++ failed with status -9: ")

    def start_and_interrupt(thread: threading.Thread) -> None:
        start(thread)
        if thread.name.endswith("_1"):
            running.wait(10)
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(batch, "_cpus", lambda: 2)
    monkeypatch.setattr(compiler, "run", run)
    monkeypatch.setattr(threading.Thread, "start", start_and_interrupt)
    with pytest.raises(KeyboardInterrupt):
        cpu.load("a")
    assert len(ended) == 2
    assert {path.suffix for path in cpu.cache_dir().iterdir()} == {".lock"}


# ---- ahead of time -----------------------------------------------------------------------------
def test_prepare_compiles_all_and_loads_none(four, compilations, monkeypatch) -> None:
    richest = cpu.levels()[0]  # which this CPU need not run
    monkeypatch.setattr(build.ctypes, "CDLL", None)
    assert cpu.prepare(richest) == cpu.cache_dir()
    assert [p.name.split("-")[1] for p in cpu.cache_dir().glob("*.so")] == [richest] * 4
    assert cpu.prepare(richest) == cpu.cache_dir()
    assert len(compilations) == 4


def test_prepare_says_why_not(four, monkeypatch) -> None:
    monkeypatch.setenv("VISION_BACKBONES_NATIVE", "off")
    with pytest.raises(RuntimeError, match="switched off by VISION_BACKBONES_NATIVE=off"):
        cpu.prepare("portable")
    monkeypatch.delenv("VISION_BACKBONES_NATIVE")
    (four / "any" / "b.cpp").write_text("this is not C++\n")
    with pytest.raises(
        RuntimeError, match="no portable kernel was built from b|'this' does not name"
    ):
        cpu.prepare("portable")
    monkeypatch.setattr(compiler.shutil, "which", lambda name: None)
    with pytest.raises(RuntimeError, match="no C\\+\\+ compiler"):
        cpu.prepare("portable")


def test_prepare_takes_the_next_folder_if_the_cache_is_read_only(
    four, compilations, monkeypatch
) -> None:
    scratch = cache.scratch

    def refuse(folder: Path) -> AbstractContextManager[Path]:
        if folder == cpu.cache_dir():
            raise OSError(errno.EROFS, "Read-only file system", str(folder))
        return scratch(folder)

    monkeypatch.setattr(cache, "scratch", refuse)
    folder = cpu.prepare("portable")
    assert folder is not None and folder.is_relative_to(cache._PERSISTENT)
    assert len(list(folder.glob("*.so"))) == 4
    assert cpu.prepare("portable") == folder
    assert len(compilations) == 4


def test_prepare_does_nothing_if_all_are_shipped(sources, compiled, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(libraries, "SHIPPED", tmp_path)
    (tmp_path / f"{libraries.stem('small', 'portable')}.so").write_bytes(b"")
    assert cpu.prepare("portable") is None


# ---- what is shown -----------------------------------------------------------------------------
def test_progress_on_a_terminal(four, compilations, monkeypatch) -> None:
    terminal = _Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    cpu.load("a")
    first, *bars, last = terminal.getvalue().replace("\r\x1b[K", "\n").splitlines()
    assert first.startswith(f"Compiling 4 C++ kernels for {cpu.instruction_set()}")
    for word in ("none came with the package", str(cpu.cache_dir()), "vision-backbones build"):
        assert word in first
    assert "VISION_BACKBONES_NATIVE=0" in first
    assert any(bar.startswith("[########################] 4/4, 0 s") for bar in bars)
    assert last == "Compiled in 0 s."
    terminal.truncate(0)
    cpu.load("b")
    assert not terminal.getvalue().strip("\0")


def test_the_bar_is_weighted_and_shows_the_time_left(monkeypatch) -> None:
    terminal, clock = _Terminal(), iter([0.0, 30.0, 40.0])
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with Progress({"large": 3.0, "small": 1.0}, "avx2", Path("/cache")) as shown:
        shown.show(["large"], ["small"])
    bar = terminal.getvalue().split("\r\x1b[K")[1]
    assert bar == "[##################......] 1/2, 30 s, 10 s left: small"


@pytest.mark.parametrize(("seconds", "lines"), [(4.9, 0), (5.1, 1)])
def test_without_a_terminal_slow_builds_log_one_line(seconds, lines, monkeypatch, caplog) -> None:
    times = [0.0, seconds, seconds + 1 if lines else seconds]
    monkeypatch.setattr(progress.time, "monotonic", lambda: times.pop(0))
    with Progress({"small": 1.0}, "avx2", Path("/cache")) as shown:
        shown.show([], ["small"])
        shown.show([], ["small"])
    said = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(said) == lines
    assert all("Compiling 1 C++ kernel for avx2" in line for line in said)


def test_what_readers_of_images_use_waits_for_nothing(four, compilations, monkeypatch) -> None:
    monkeypatch.setattr(build, "_ALONE", {"a"})
    assert cpu.load("a").answer() == 42
    assert _kept() == ["a"]
    assert cpu.load("c").answer() == 42
    assert _kept() == _NAMES
    assert len(compilations) == 4
