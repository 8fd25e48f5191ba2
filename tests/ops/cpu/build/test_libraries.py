"""Libraries come with the package or are compiled once; without them, plain layers run."""

from __future__ import annotations

import errno
import logging
import re
import shlex
import shutil
import threading
from pathlib import Path

import pytest
import torch
from compiled_kernels import random
from fresh_python import run_code

from ops import cpu
from ops.cpu import build, instruction_sets
from ops.cpu.build import compiler, folders, libraries
from ops.neighborhood import na2d

_NAMES = ["a", "b", "c", "small"]


@pytest.fixture
def four(sources: Path) -> Path:
    """Three more kernels."""
    for name in _NAMES[:3]:
        (sources / "any" / f"{name}.cpp").write_text('extern "C" int answer() { return 42; }\n')
    return sources


def _kept() -> list[str]:
    return sorted(path.name.partition("-")[0] for path in cpu.cache_dir().glob("*.so"))


def _without_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler.shutil, "which", lambda name: None)


# ---- compiled on first use ---------------------------------------------------------------------
def test_builds_once_and_says_it(sources, monkeypatch, caplog, new_process):
    with caplog.at_level(logging.INFO, logger="ops.cpu"):
        assert cpu.load("small").answer() == 42
    announced, done = (r.getMessage() for r in caplog.records)
    assert announced.startswith(f"Compiling 1 C++ kernels for {cpu.instruction_set()}")
    assert str(cpu.cache_dir()) in announced and "vision-backbones build" in announced
    assert "Compiled the small kernel" in done
    assert cpu.unavailable_reason("small") is None
    # Nothing but the library and the lock is left behind.
    assert sorted(p.suffix for p in cpu.cache_dir().iterdir()) == ["", ".so"]

    caplog.clear()
    new_process()
    monkeypatch.setattr(compiler, "run", None)  # not called again
    with caplog.at_level(logging.INFO, logger="ops.cpu"):
        assert cpu.load("small").answer() == 42
    assert not caplog.records


def test_changed_sources_are_rebuilt(sources, new_process):
    assert cpu.load("small").answer() == 42
    new_process()
    (sources / "value.h").write_text("#define VALUE 43\n")
    (sources / "any" / "small.cpp").write_text(
        '#include "value.h"\nextern "C" int answer() { return VALUE; }\n'
    )
    assert cpu.load("small").answer() == 43
    new_process()
    (sources / "value.h").write_text("#define VALUE 44\n")
    assert cpu.load("small").answer() == 44
    assert len(_kept()) == 3


def test_the_first_kernel_compiles_the_others(four, compilations) -> None:
    assert cpu.load("b").answer() == 42
    assert _kept() == _NAMES
    for name in _NAMES:
        assert cpu.load(name).answer() == 42
    assert len(compilations) == 4


def test_concurrent_processes_build_once(tmp_path):
    """All of them get the library, one of them compiles it."""
    (tmp_path / "any").mkdir()
    (tmp_path / "any" / "small.cpp").write_text('extern "C" int answer() { return 42; }\n')
    # What they import is imported once, before they fork.
    code = (
        "import logging, os; logging.basicConfig(level=logging.INFO)\n"
        f"os.environ['VISION_BACKBONES_CACHE_DIR'] = {str(tmp_path / 'cache')!r}\n"
        "from pathlib import Path; from ops.cpu import build\n"
        f"build.process.sources.root = Path({str(tmp_path)!r})\n"
        "for _ in range(3):\n"
        "    if not os.fork():\n"
        "        assert build.load('small').answer() == 42\n"
        "        os._exit(0)\n"
        "print([os.wait()[1] for _ in range(3)])\n"
    )
    said = run_code(code, tmp_path)
    assert said.endswith("[0, 0, 0]\n"), said
    assert said.count("Compiled the small kernel") == 1
    assert len(list((tmp_path / "cache" / "native").glob("small-*.so"))) == 1


def test_concurrent_threads_load_once(compilations):
    threads = [threading.Thread(target=cpu.load, args=("small",)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(compilations) == 1
    assert cpu.load("small").answer() == 42


# ---- a plainer instruction set -----------------------------------------------------------------
def test_instruction_set(compilations, monkeypatch, new_process):
    best = cpu.instruction_set()
    for isa in instruction_sets.candidates():
        monkeypatch.setenv("VISION_BACKBONES_NATIVE_ISA", isa.title())
        new_process()
        assert cpu.instruction_set() == cpu.status("small").instruction_set == isa
        assert cpu.status("small").path.name.startswith(f"small-{isa}-")
    monkeypatch.setenv("VISION_BACKBONES_NATIVE_ISA", instruction_sets.levels()[0])
    assert cpu.instruction_set() == best  # never more than the CPU has


@pytest.mark.parametrize("word", ["sse2", "native", "0", "avx2,avx512", "-1", "\udcff", "x" * 9999])
def test_invalid_instruction_set(word, sources, monkeypatch):
    monkeypatch.setenv("VISION_BACKBONES_NATIVE_ISA", word)
    said = re.escape(f"must be one of {cpu.levels()}, got {word!r}")
    for use in (cpu.instruction_set, lambda: cpu.load("small")):
        with pytest.raises(ValueError, match=f"VISION_BACKBONES_NATIVE_ISA {said}"):
            use()


def test_a_compiler_without_the_instruction_set(sources, monkeypatch, tmp_path):
    chosen = tmp_path / "old c++"
    chosen.write_text(
        '#!/bin/sh\ncase " $@ " in *" -mavx2 "*) echo "error: no" >&2; exit 1;; esac\n'
        f'exec {shlex.join(compiler.find_compilers([])[0])} "$@"\n'
    )
    chosen.chmod(0o755)
    monkeypatch.setattr(compiler, "find_compilers", lambda words: [[str(chosen)]])
    assert cpu.load("small").answer() == 42
    assert cpu.status("small").instruction_set == "portable"


@pytest.fixture
def caller(sources):
    """A kernel that calls the one of linear layers."""
    (sources / "gemm").mkdir()
    (sources / "gemm" / "gemm.cpp").write_text(
        'extern "C" int linear_forward() { return 6; }\n#ifdef VB_OLD\n#error no\n#endif\n'
    )
    (sources / "gemm" / "call.h").write_text(
        'static int (*gemm)();\nextern "C" void linear_use(int (*forward)()) { gemm = forward; }\n'
    )
    (sources / "any" / "caller.cpp").write_text(
        '#include "gemm/call.h"\nextern "C" int answer() { return 7 * gemm(); }\n'
    )
    return sources


@pytest.mark.parametrize("plain", [set(), {"caller"}])
def test_kernels_are_linked_with_gemm(plain, caller, monkeypatch):
    monkeypatch.setattr(libraries, "_OF_PLAIN_LAYERS", plain)
    (caller / "any" / "small.cpp").unlink()
    assert cpu.load("caller").answer() == 42
    assert _kept() == ["caller", "gemm"]  # which were compiled at once


def test_instruction_set_matches_the_called_kernel(caller, monkeypatch):
    """As weights are packed for these."""
    monkeypatch.setitem(instruction_sets.FLAGS, cpu.instruction_set(), ["-DVB_OLD"])
    assert cpu.load("caller").answer() == 42
    sets = {cpu.status(name).instruction_set for name in ("caller", "gemm")}
    assert len(sets) == 1 and sets != {cpu.instruction_set()}
    assert cpu.status("small").instruction_set == cpu.instruction_set()


def test_kernels_are_missing_without_the_one_they_call(caller):
    (caller / "gemm" / "gemm.cpp").write_text("this is not C++\n")
    assert cpu.load("caller") is None
    assert "gemm.cpp" in cpu.unavailable_reason("caller")
    assert cpu.load("small").answer() == 42


# ---- nothing can be compiled -------------------------------------------------------------------
def test_no_compiler(sources, monkeypatch, caplog):
    _without_compiler(monkeypatch)
    with caplog.at_level(logging.INFO, logger="ops.cpu"):
        assert cpu.load("small") is None
        assert cpu.load("small") is None
    assert "no C++ compiler" in cpu.unavailable_reason("small")
    assert len(caplog.records) == 1 and caplog.records[0].levelno == logging.INFO
    assert not cpu.cache_dir().exists()


def test_a_failed_kernel_does_not_stop_the_others(four) -> None:
    (four / "any" / "b.cpp").write_text("this is not C++\n")
    assert cpu.load("a").answer() == 42
    assert _kept() == ["a", "c", "small"]
    assert cpu.load("c").answer() == 42
    assert cpu.load("b") is None
    assert "error" in cpu.unavailable_reason("b")


def _failing(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Let compilers write half of a library and fail; returns their commands."""
    attempts = []

    def run(words: list[str], scratch: Path) -> None:
        attempts.append(words)
        Path(words[-1]).write_bytes(b"half of it")
        raise error

    monkeypatch.setattr(compiler, "run", run)
    return attempts


def test_a_killed_compiler_is_not_tried_again(compilations, sources, monkeypatch, warned):
    """Neither for a plainer instruction set nor for kernels that come later."""
    error = compiler.CompilerError("c++ failed with status -9: ")
    attempts = _failing(error, monkeypatch)
    assert cpu.load("small") is None
    (sources / "any" / "other.cpp").write_text("")
    assert cpu.load("other") is None
    assert len(attempts) == 1
    assert "status -9" in cpu.unavailable_reason("other")
    assert len(warned()) == 1
    assert not list(cpu.cache_dir().glob(f"{folders._SCRATCH_PREFIX}*"))


def test_plain_layers_run_at_once_where_nothing_can_be_compiled(monkeypatch, sources, warned):
    for kernel in ("neighborhood", "other"):
        (sources / "any" / f"{kernel}.cpp").write_text("")
    attempts = _failing(OSError(errno.ENOSPC, "No space left on device"), monkeypatch)
    monkeypatch.setattr(libraries, "cores", lambda: 1)
    x = random(1, 5, 6, 2, 4).float()
    out = na2d(x, x, x, 3)
    before = len(attempts)
    assert cpu.load("other") is None and na2d(x, x, x, 3) is not None
    assert len(attempts) == before
    torch.testing.assert_close(out, na2d(x, x, x, 3, backend="reference"))
    (line,) = warned()
    assert line.count("No space left") == 2  # in the cache and in the private folder
    assert not list(sources.parent.glob(f"**/{folders._SCRATCH_PREFIX}*"))
    assert not list(sources.parent.glob("**/*.so"))


def test_ctrl_c_leaves_nothing_and_is_not_remembered(four, compilations, monkeypatch) -> None:
    """In a terminal, it ends the compilers, too; in a notebook, one goes on."""

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        _failing(KeyboardInterrupt(), patch)
        cpu.load("a")
    assert [path.name for path in cpu.cache_dir().iterdir()] == ["lock"]
    assert cpu.load("a").answer() == 42


@pytest.mark.parametrize("word", ["0", "false", "No", "OFF", " off "])
def test_switched_off(word, sources, compiled, monkeypatch):
    """Also those of the package."""
    _ship(compiled[42], cpu.instruction_set())
    monkeypatch.setenv("VISION_BACKBONES_NATIVE", word)
    assert cpu.load("small") is None
    assert f"VISION_BACKBONES_NATIVE={word}" in cpu.unavailable_reason("small")
    assert not cpu.cache_dir().exists()
    with pytest.raises(ValueError, match="'other'.*small"):
        cpu.load("other")


# ---- ahead of time -----------------------------------------------------------------------------
def test_prepare_compiles_all_and_loads_none(four, compilations, monkeypatch) -> None:
    richest = cpu.levels()[0]  # which this CPU need not run
    monkeypatch.setattr(libraries.ctypes, "CDLL", None)
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
    with pytest.raises(RuntimeError, match="no portable kernel was built from b"):
        cpu.prepare("portable")
    _without_compiler(monkeypatch)
    with pytest.raises(RuntimeError, match="no C\\+\\+ compiler"):
        cpu.prepare("portable")


# ---- with the package --------------------------------------------------------------------------
def _ship(library: Path, isa: str) -> Path:
    process = build.process
    process.shipped.mkdir(exist_ok=True)
    path = process.shipped / f"{process.sources.stem('small', isa)}.so"
    return Path(shutil.copyfile(library, path))


def test_a_library_of_the_package_needs_no_compiler(sources, compiled, monkeypatch) -> None:
    _without_compiler(monkeypatch)
    for isa in cpu.levels():
        _ship(compiled[42 if isa == cpu.instruction_set() else 13], isa)
    path = _ship(compiled[42], cpu.instruction_set())
    monkeypatch.setenv("VISION_BACKBONES_NATIVE", "on")
    assert cpu.load("small").answer() == 42
    state = cpu.status("small")
    assert (state.path, state.instruction_set) == (path, cpu.instruction_set())
    assert cpu.prepare(cpu.instruction_set()) is None
    assert not cpu.cache_dir().exists()


def test_a_library_of_other_flags_is_not_loaded(sources, compiled, monkeypatch) -> None:
    """Nor one of other sources, as above."""
    _without_compiler(monkeypatch)
    _ship(compiled[13], cpu.instruction_set())
    monkeypatch.setattr(instruction_sets, "COMMON_FLAGS", ["-O1", "-fPIC", "-shared"])
    assert cpu.load("small") is None


def test_a_library_that_does_not_load_here_is_compiled(sources, compiled) -> None:
    path = _ship(compiled[42], cpu.instruction_set())
    path.write_bytes(b"the code of another system")
    assert cpu.load("small").answer() == 42
    assert cpu.status("small").path.parent == cpu.cache_dir()
    assert path.exists()
