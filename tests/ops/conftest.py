"""A kernel that compiles instantly, and folders of kernels, each test's own or shared."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ops.cpu import build
from ops.cpu.build import compiler, folders
from ops.cpu.build.libraries import Libraries
from ops.cpu.build.sources import Sources

# Without a compiler, zig's: what it keeps is built once rather than for each test's folder.
os.environ.setdefault("ZIG_GLOBAL_CACHE_DIR", str(folders.user_cache() / "zig"))

SOURCE = 'extern "C" int answer() { return 42; }\n'


@pytest.fixture
def new_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """A function after which nothing is known about libraries, as in a new process."""

    def forget() -> None:
        libraries = Libraries(Sources(tmp_path / "sources"), tmp_path / "shipped")
        monkeypatch.setattr(build, "process", libraries)

    return forget


@pytest.fixture
def sources(
    new_process: Callable[[], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    """The folder of ``small.cpp``, in place of the real kernels; nothing is compiled yet."""
    before = os.umask(0o022)
    folder = tmp_path / "sources"
    (folder / "any").mkdir(parents=True)
    (folder / "any" / "small.cpp").write_text(SOURCE)
    for name in ("lasting", "temporary"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(folders, "_PERSISTENT", tmp_path / "lasting")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setenv("VISION_BACKBONES_CACHE_DIR", str(tmp_path / "the user's cäche"))
    for name in ("VISION_BACKBONES_NATIVE", "VISION_BACKBONES_NATIVE_ISA", "CXX"):
        monkeypatch.delenv(name, raising=False)
    new_process()
    yield folder
    os.umask(before)


@pytest.fixture
def warned(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """The warnings so far, without the announcements of compilations."""

    def lines() -> list[str]:
        said = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
        return [line for line in said if not line.startswith("Compiling ")]

    return lines


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
def with_tiles() -> Path:
    """The folder of kernels with emulated tiles, each of which is compiled once, for all runs."""
    header = Path(__file__).parents[1] / "emulated_tiles.h"
    digest = hashlib.sha256(header.read_bytes()).hexdigest()[:12]
    return folders.user_cache().with_name(f"emulated-tiles-{digest}")


@pytest.fixture
def compilations(
    sources: Path, compiled: dict[int, Path], monkeypatch: pytest.MonkeyPatch
) -> list[list[str]]:
    """The commands that compiled so far; a copy stands for the compiler, which is slower."""
    done: list[list[str]] = []

    def run(words: list[str], scratch: Path, running: object = None) -> None:
        shutil.copyfile(compiled[42], words[-1])
        done.append(words)

    monkeypatch.setattr(compiler, "run", run)
    return done
