"""Compilers, also zig's and those for other systems, and the one OpenMP runtime of a process."""

from __future__ import annotations

import errno
import importlib.util
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import needed
import pytest
from emulators import windows_compiler
from fresh_python import run_code
from without_unix import WITHOUT_UNIX

from backbones.cli import doctor
from backbones.cli.main import main
from ops import cpu
from ops.cpu import instruction_sets
from ops.cpu.build import compiler
from ops.cpu.build.sources import Sources, suffix


# ---- running a compiler --------------------------------------------------------------------------
def script(folder: Path, text: str) -> list[str]:
    path = folder / "compiler"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return [str(path)]


def scratch(folder: Path) -> Path:
    made = folder / "scratch"
    made.mkdir()
    return made


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
        full = caught.value
        assert (full.errno, full.filename) == (errno.ENOSPC, str(tmp_path))
        assert full.strerror in said
    else:
        assert said in str(caught.value)


def test_not_a_compiler(tmp_path: Path) -> None:
    words = script(tmp_path, "")
    Path(words[0]).write_bytes(b"\0\0")
    with pytest.raises(compiler.RefusedError, match="Exec format error"):
        compiler.run(words, tmp_path)
    Path(words[0]).unlink()
    with pytest.raises(compiler.RefusedError, match="No such file"):
        compiler.run(words, tmp_path)


@pytest.mark.parametrize(
    ("does", "said"), [("kill -9 $$", "status -9"), ("exec sleep 60", "did not end within")]
)
def test_a_killed_compiler_and_a_hung_one(does: str, said: str, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(compiler, "_TIMEOUT_S", 0.3)
    with pytest.raises(compiler.CompilerError, match=said):
        compiler.run(script(tmp_path, does), scratch(tmp_path))


# ---- clang in the package ziglang ----------------------------------------------------------------
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


# ---- without what Windows lacks ------------------------------------------------------------------
_FUSED = """
import torch
import backbones
from ops import cpu
torch.manual_seed(0)
model = backbones.create_model("shvit_s1").eval()
image = torch.randn(1, 3, 64, 64)
with torch.inference_mode():
    expected = model(image)
    out = backbones.fuse(model)(image)
torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-4)
assert cpu.status("gemm").library is not None, cpu.unavailable_reason("gemm")
"""
_COMPILED = """
from pathlib import Path
from ops.cpu import build
from ops.cpu.build import folders
from ops.cpu.build.sources import Sources
os.environ["VISION_BACKBONES_CACHE_DIR"] = sys.argv[1]
build.process = build.Libraries(Sources(Path(sys.argv[1])))
assert build.load("small").answer() == 42, build.unavailable_reason("small")
assert build.status("small").path.parent == build.cache_dir()
assert folders.candidates()[1].name == "native"
"""


def test_a_fused_model_and_a_compiler_without_what_windows_lacks(tmp_path: Path) -> None:
    (tmp_path / "any").mkdir()
    (tmp_path / "any" / "small.cpp").write_text('extern "C" int answer() { return 42; }\n')
    run_code(WITHOUT_UNIX + _FUSED + _COMPILED, tmp_path, tmp_path)


def test_libraries_of_systems_differ() -> None:
    sources = Sources()
    stems = {sources.stem("norm", "portable", "x86_64", s) for s in ("linux", "win32", "darwin")}
    assert len(stems) == 3
    assert [suffix(s) for s in ("linux", "win32", "darwin")] == [".so", ".dll", ".so"]


def test_compilers_on_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not any on the path: GCC misaligns vectors there."""
    words = windows_compiler()
    monkeypatch.setattr(compiler.shutil, "which", lambda name: name)
    monkeypatch.setattr(compiler.sys, "platform", "win32")
    monkeypatch.setattr(instruction_sets, "machine", lambda: "x86_64")
    (found,) = compiler.find_compilers([])
    assert found[-1] == words[-1] == "x86_64-windows-gnu"
    assert compiler.find_compilers(["my-c++"])[0] == ["my-c++"]


# ---- threads of torch's OpenMP runtime -----------------------------------------------------------
_RUNTIME = re.compile(r"/lib(?:gomp|iomp5|omp)\b[^/]*$")
# Neighborhood attention in two threads, after a sum of torch's in two.
_CODE = """
import os, sys, torch
torch.set_num_threads(2)
torch.ones(1 << 22).sum()
def tasks(): return len(os.listdir("/proc/self/task"))
before = tasks()
from ops.cpu.build import openmp
from ops.neighborhood import na2d
x = torch.randn(1, 24, 24, 4, 32)
torch.testing.assert_close(na2d(x, x, x, 7, backend="cpu"), na2d(x, x, x, 7, backend="reference"))
libraries = {line.split(maxsplit=5)[5].strip() for line in open("/proc/self/maps") if "/" in line}
print(before, tasks(), openmp.runtime(), *sorted(libraries), sep="\\n")
"""


def _reported(said: str) -> tuple[int, int, Path, list[str]]:
    """What the code prints, after anything said of compiling."""
    lines = itertools.dropwhile(lambda line: not line.isdigit(), said.splitlines())
    before, after, runtime, *mapped = lines
    return int(before), int(after), Path(runtime), [m for m in mapped if _RUNTIME.search(m)]


def test_a_process_has_one_runtime_and_one_pool_of_threads(tmp_path: Path) -> None:
    before, after, runtime, mapped = _reported(run_code(_CODE, tmp_path))
    assert mapped == [str(runtime)]
    assert after == before


@pytest.mark.needs("libomp")
@pytest.mark.slow
def test_a_runtime_that_was_preloaded_is_shared_too() -> None:
    """As people who tune torch do; torch's own stays mapped, and does nothing."""
    preloaded = needed.libomp()
    environment = {k: v for k, v in os.environ.items() if k not in ("OMP_NUM_THREADS",)}
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path), "LD_PRELOAD": str(preloaded)}
    done = subprocess.run(
        [sys.executable, "-c", _CODE], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    before, after, runtime, _ = _reported(done.stdout)
    assert runtime.resolve() == preloaded.resolve()
    assert after == before
