"""Without a C++ compiler, the clang in the package ziglang compiles."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from backbones.cli import doctor
from backbones.cli.main import main
from ops import cpu
from ops.cpu import instruction_sets
from ops.cpu.build import compiler

# What kernels use of C++'s library: allocations, exceptions from it and through it, destructors of
# threads. Answers 42.
_LIBRARY = """
#include <cmath>
#include <exception>
#include <new>
#include <vector>
static int caught(int64_t count) {
  static thread_local std::vector<std::vector<double>> rows;
  try {
    if (count < 0) throw std::bad_alloc();
    rows.resize(2);
    rows[0].resize(count);
    return rows[0].size() + std::erfc(0.0) - 1;
  } catch (const std::exception&) {
    return -1;
  }
}
extern "C" int answer() {
  return caught(-1) == -1 && caught(1LL << 62) == -1 && caught(1LL << 58) == -1 ? caught(42) : 0;
}
""".replace("int64_t", "long long")


@pytest.fixture
def no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)


_RICHEST, *_OTHERS = instruction_sets.candidates()


@pytest.mark.parametrize(
    "isa", [_RICHEST, *(pytest.param(isa, marks=pytest.mark.slow) for isa in _OTHERS)]
)
def test_it_compiles(isa: str, sources: Path, no_compiler: None, monkeypatch) -> None:
    monkeypatch.setenv("VISION_BACKBONES_NATIVE_ISA", isa)
    (sources / "any" / "small.cpp").write_text(_LIBRARY)
    assert cpu.load("small").answer() == 42, cpu.unavailable_reason("small")
    assert cpu.status("small").instruction_set == isa


def test_the_flags_alone_say_what_the_cpu_has(
    sources: Path, no_compiler: None, monkeypatch
) -> None:
    """Not this CPU, for which zig compiles by default."""
    monkeypatch.setenv("VISION_BACKBONES_NATIVE_ISA", "portable")
    (sources / "any" / "small.cpp").write_text(
        "#if defined(__AVX__) || defined(__ARM_FEATURE_BF16)\n#error it does\n#endif\n"
        'extern "C" int answer() { return 42; }\n'
    )
    assert cpu.load("small").answer() == 42, cpu.unavailable_reason("small")


def test_an_invalid_source(sources: Path, no_compiler: None) -> None:
    (sources / "any" / "small.cpp").write_text("this is not C++\n")
    assert cpu.load("small") is None
    reason = cpu.unavailable_reason("small")
    assert "ziglang/zig failed with status 1: " in reason and "small.cpp:1:1: error: " in reason


def test_it_is_the_last_to_be_asked(tmp_path: Path, no_compiler: None) -> None:
    ((*words, zig, target),) = compiler.find_compilers([])
    assert words[0] == sys.executable and Path(zig).name == "zig"
    assert compiler.label([*words, zig, target]) == zig
    (tmp_path / "g++").touch(0o755)
    assert compiler.find_compilers([]) == [[str(tmp_path / "g++")]]


def test_neither_is_there(
    sources: Path, no_compiler: None, monkeypatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    said = "no C++ compiler found ($CXX, c++, g++, clang++ or the Python package ziglang)"
    assert main(["build", "--isa", "portable"]) == 2
    assert capsys.readouterr().err == f"error: no kernels for portable: {said}\n"
    assert doctor.examine_compiler()[0].fix == "pip install ziglang"
