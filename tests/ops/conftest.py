"""A kernel that compiles instantly, and folders of kernels, each test's own or shared."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import pytest

from ops.cpu import batch, build, cache, compiler, libraries

# Without a compiler, zig's: what it keeps is built once rather than for each test's folder.
os.environ.setdefault("ZIG_GLOBAL_CACHE_DIR", str(cache.cache_dir() / "zig"))

SOURCE = 'extern "C" int answer() { return 42; }\n'


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of ``small.cpp``, in place of the real kernels; nothing is compiled yet."""
    folder = tmp_path / "sources"
    (folder / "any").mkdir(parents=True)
    (folder / "any" / "small.cpp").write_text(SOURCE)
    for name in ("lasting", "temporary"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(libraries, "SOURCES", folder)
    monkeypatch.setattr(cache, "_PERSISTENT", tmp_path / "lasting")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr(cache, "_temporary", [])
    monkeypatch.setenv("VISION_BACKBONES_CACHE_DIR", str(tmp_path / "cache"))
    for name in ("NATIVE", "NATIVE_ISA"):
        monkeypatch.delenv(f"VISION_BACKBONES_{name}", raising=False)
    for name in ("CXX", "XDG_RUNTIME_DIR"):
        monkeypatch.delenv(name, raising=False)
    start_anew(monkeypatch)
    return folder


def start_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a new process: nothing is known."""
    monkeypatch.setattr(build, "_kernels", {})
    monkeypatch.setattr(batch, "_compiler_failure", None)
    monkeypatch.setattr(batch, "_refused", {})
    monkeypatch.setattr(build, "_logged", set())
    monkeypatch.setattr(cache, "_refused", {})


@pytest.fixture
def new_process(monkeypatch: pytest.MonkeyPatch):
    """A function after which everything is as in a new process."""
    return lambda: start_anew(monkeypatch)


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """What ``small.cpp`` compiles to, by its answer: the right one, and another."""
    folder = tmp_path_factory.mktemp("compiled")
    made = {}
    for answer in (42, 13):
        source = folder / f"{answer}.cpp"
        source.write_text(SOURCE.replace("42", str(answer)))
        made[answer] = folder / f"{answer}.so"
        words = ["-shared", "-fPIC", str(source), "-o", str(made[answer])]
        compiler.run([*compiler.find_compilers([])[0], *words], folder)
    return made


@pytest.fixture(scope="session")
def with_tiles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of kernels with emulated tiles, each of which is compiled once."""
    return tmp_path_factory.mktemp("with_tiles")


@pytest.fixture
def compilations(
    sources: Path, compiled: dict[int, Path], monkeypatch: pytest.MonkeyPatch
) -> list[list[str]]:
    """The commands that compiled so far; a copy stands for the compiler, which is slower."""
    done: list[list[str]] = []

    def run(words: list[str], scratch: Path) -> None:
        shutil.copyfile(compiled[42], words[-1])
        done.append(words)

    monkeypatch.setattr(compiler, "run", run)
    return done
