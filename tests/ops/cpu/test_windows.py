"""Kernels for Windows: their own tests, cross-compiled and run in Wine."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
from emulators import KERNELS, WINDOWS, run_tests, windows_compiler

from ops.cpu import instruction_sets
from ops.cpu.build.sources import SOURCES, Sources

pytestmark = [
    pytest.mark.slow,
    pytest.mark.needs("wine"),
    pytest.mark.timeout(1200),  # zig first compiles its C++ library
]
_TESTS = Path(__file__).parents[2]
# The richest set and one in the middle; there are no tiles on Windows.
_SETS = {next((s for s in instruction_sets.candidates() if s != "amx"), "portable"), "avx2"}


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For the program, and for what Wine keeps."""
    return tmp_path_factory.mktemp("windows")


@pytest.mark.parametrize("instructions", sorted(_SETS & {*instruction_sets.candidates()}))
@pytest.mark.parametrize("tests", list(KERNELS))
def test_kernels(tests: str, instructions: str, scratch: Path) -> None:
    run_tests(tests, instructions, WINDOWS, scratch)


def test_threads_are_those_of_the_runtime(scratch: Path) -> None:
    """Of one with the functions that torch's has on Windows."""
    program = scratch / "windows_threads.exe"
    words = [*windows_compiler()[:1], "-m", "ziglang", "c++", "-target", "x86_64-windows-gnu"]
    words += ["-std=c++17", "-O3", "-Wall", "-Wextra", "-Werror", "-fno-sanitize=undefined"]
    source = _TESTS / "windows_threads.cpp"
    subprocess.run([*words, f"-I{SOURCES}", str(source), "-o", str(program)], check=True)
    environment = {**os.environ, "WINEPREFIX": str(scratch / "wine"), "WINEDEBUG": "-all"}
    assert subprocess.run(["wine", str(program)], env=environment).returncode == 0


@pytest.mark.parametrize("name", ["gemm", "replay", "wkv"])
def test_a_library_needs_nothing_but_windows(name: str, tmp_path: Path) -> None:
    built = tmp_path / f"{name}.dll"
    Sources().compile(built, name, "avx2", [windows_compiler()])
    needed = {found.lower() for found in re.findall(rb"[\w-]+\.dll", built.read_bytes(), re.I)}
    own = f"{name}.dll".encode()
    assert all(n in (own, b"kernel32.dll") or n.startswith(b"api-ms-win-crt-") for n in needed)
