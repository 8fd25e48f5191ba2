"""Building kernels: once, atomically, with concurrent processes, and without a compiler."""

import errno
import logging
import os
import re
import shlex
import signal
import sys
import threading
from pathlib import Path

import pytest
import torch
from compiled_kernels import random
from fresh_python import run_code

from ops import cpu
from ops.cpu import batch, build, cache, compiler, instruction_sets, libraries
from ops.neighborhood import na2d


def _compiler(path: Path, script: str) -> Path:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def _that_refuses(option: str, path: Path) -> Path:
    return _compiler(
        path,
        f'for a in "$@"; do [ "$a" = {option} ] && {{ echo "error: no" >&2; exit 1; }}; done\n'
        f'exec {shlex.join(compiler.find_compilers([])[0])} "$@"',
    )


def test_builds_once_and_logs_it(sources, monkeypatch, caplog, new_process):
    with caplog.at_level(logging.INFO, logger="ops.cpu"):
        assert cpu.load("small").answer() == 42
    assert len(caplog.records) == 1
    assert "Compiled the small kernel" in caplog.text
    assert cpu.unavailable_reason("small") is None
    # Nothing but the library and its lock is left behind.
    names = sorted(p.name for p in cpu.cache_dir().iterdir())
    assert sorted(Path(name).suffix for name in names) == [".lock", ".so"]

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
    assert len(list(cpu.cache_dir().glob("*.so"))) == 3


def test_no_compiler(sources, monkeypatch, caplog):
    monkeypatch.setattr(compiler.shutil, "which", lambda name: None)
    with caplog.at_level(logging.INFO, logger="ops.cpu"):
        assert cpu.load("small") is None
        assert cpu.load("small") is None
    assert "no C++ compiler" in cpu.unavailable_reason("small")
    assert len(caplog.records) == 1 and caplog.records[0].levelno == logging.INFO
    assert not cpu.cache_dir().exists()


def test_no_compiler_but_libraries_for_fewer_instructions(compilations, monkeypatch, new_process):
    """As in an image whose kernels were compiled on an older machine."""
    monkeypatch.setenv("VISION_BACKBONES_NATIVE_ISA", "portable")
    assert cpu.load("small").answer() == 42
    new_process()
    monkeypatch.delenv("VISION_BACKBONES_NATIVE_ISA")
    monkeypatch.setattr(compiler.shutil, "which", lambda name: None)
    assert cpu.load("small").answer() == 42
    assert cpu.status("small").instruction_set == "portable"


def test_invalid_source(sources):
    (sources / "any" / "small.cpp").write_text("this is not C++\n")
    assert cpu.load("small") is None
    assert "error" in cpu.unavailable_reason("small")
    assert not list(cpu.cache_dir().glob("*.so"))


def test_cxx_does_not_exist(compilations, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler -O1")
    assert cpu.load("small").answer() == 42


def test_cxx_with_unbalanced_quotes(compilations, monkeypatch, caplog):
    monkeypatch.setenv("CXX", "g++ 'x")
    with caplog.at_level(logging.WARNING, logger="ops.cpu"):
        assert cpu.load("small").answer() == 42
    assert [r.getMessage() for r in caplog.records] == [
        'CXX="g++ \'x" is not a command: No closing quotation; other compilers are tried'
    ]


@pytest.mark.parametrize("word", ["0", "false", "No", "OFF", " off "])
def test_switched_off(word, sources, monkeypatch):
    monkeypatch.setenv("VISION_BACKBONES_NATIVE", word)
    assert cpu.load("small") is None
    assert f"VISION_BACKBONES_NATIVE={word}" in cpu.unavailable_reason("small")
    assert not cpu.cache_dir().exists()


@pytest.mark.parametrize("word", ["1", "True", "YES", "on", ""])
def test_switched_on(word, compilations, monkeypatch):
    monkeypatch.setenv("VISION_BACKBONES_NATIVE", word)
    assert cpu.load("small").answer() == 42


def test_invalid_switch(sources, monkeypatch):
    monkeypatch.setenv("VISION_BACKBONES_NATIVE", "maybe")
    with pytest.raises(ValueError, match=r"VISION_BACKBONES_NATIVE must be .*'false'.*'maybe'"):
        cpu.load("small")


def test_missing_sources(sources, caplog):
    (sources / "any" / "small.cpp").unlink()
    with caplog.at_level(logging.WARNING, logger="ops.cpu"):
        assert cpu.load("small") is None
    assert "small.cpp" in cpu.unavailable_reason("small")
    assert len(caplog.records) == 1


def test_instruction_set(compilations, monkeypatch):
    best = cpu.instruction_set()
    monkeypatch.setenv("VISION_BACKBONES_NATIVE_ISA", "Portable")
    assert cpu.instruction_set() == "portable"
    assert cpu.status("small").path.name.startswith("small-portable-")
    monkeypatch.setenv("VISION_BACKBONES_NATIVE_ISA", instruction_sets.levels()[0])
    assert cpu.instruction_set() == best  # never more than the CPU has


@pytest.mark.parametrize("word", ["sse2", "native", "0", "avx2,avx512", "-1", "\udcff", "x" * 9999])
def test_invalid_instruction_set(word, sources, monkeypatch):
    monkeypatch.setenv("VISION_BACKBONES_NATIVE_ISA", word)
    said = re.escape(f"must be one of {cpu.levels()}, got {word!r}")
    for use in (cpu.instruction_set, lambda: cpu.load("small")):
        with pytest.raises(ValueError, match=f"VISION_BACKBONES_NATIVE_ISA {said}"):
            use()


@pytest.mark.parametrize(
    ("capability", "bfloat16", "tiles", "expected"),
    [
        ("AVX512", True, True, "amx"),
        ("AVX512", True, False, "avx512bf16"),
        ("AVX512", False, False, "avx512"),
        ("AVX2", True, True, "avx2"),  # as ATEN_CPU_CAPABILITY wants it
        ("DEFAULT", False, False, "portable"),
    ],
)
def test_instruction_set_of_other_cpus(capability, bfloat16, tiles, expected, sources, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(instruction_sets, "_richest", instruction_sets._richest.__wrapped__)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bfloat16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: tiles)
    assert cpu.instruction_set() == expected


def test_compiler_without_the_instruction_set(sources, monkeypatch, tmp_path):
    """What it knows is taken instead."""
    chosen = _that_refuses("-mavx2", tmp_path / "old c++")
    monkeypatch.setattr(build, "_compilers", lambda: [[str(chosen)]])
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
    monkeypatch.setattr(build, "_OF_PLAIN_LAYERS", plain)
    (caller / "any" / "small.cpp").unlink()
    assert cpu.load("caller").answer() == 42
    assert len(list(cpu.cache_dir().glob("*.so"))) == 2  # which were compiled at once


def test_instruction_set_matches_the_called_kernel(caller, monkeypatch):
    """As weights are packed for these."""
    monkeypatch.setitem(instruction_sets.FLAGS, cpu.instruction_set(), ["-DVB_OLD"])
    assert cpu.load("caller").answer() == 42
    sets = {cpu.status(name).instruction_set for name in ("caller", "gemm")}
    assert len(sets) == 1 and sets != {cpu.instruction_set()}
    assert cpu.status("small").instruction_set == cpu.instruction_set()


def test_instruction_set_matches_that_of_packed_weights(caller, monkeypatch):
    (caller / "gemm" / "pack.h").write_text("")
    (caller / "any" / "reader.cpp").write_text(
        '#include "gemm/pack.h"\nextern "C" int answer() { return 42; }\n'
    )
    monkeypatch.setitem(instruction_sets.FLAGS, cpu.instruction_set(), ["-DVB_OLD"])
    assert cpu.load("reader").answer() == 42
    assert cpu.status("reader").instruction_set == cpu.status("gemm").instruction_set
    assert cpu.status("reader").instruction_set != cpu.instruction_set()


def test_kernels_are_missing_without_the_one_they_call(caller):
    (caller / "gemm" / "gemm.cpp").write_text("this is not C++\n")
    assert cpu.load("caller") is None
    assert "gemm.cpp" in cpu.unavailable_reason("caller")
    assert cpu.load("small").answer() == 42


def test_only_a_rejection_selects_a_plainer_instruction_set(
    compilations, monkeypatch, new_process, caplog
):
    """A compiler that is killed does not, nor is it tried for kernels that come later."""
    attempts = []

    def killed(words, scratch):
        attempts.append(words)
        raise compiler.CompilerError("c++ failed with status -9: ")

    works = compiler.run
    monkeypatch.setattr(compiler, "run", killed)
    monkeypatch.setattr(batch, "_cpus", lambda: 1)
    (libraries.SOURCES / "any" / "other.cpp").write_text("")
    with caplog.at_level(logging.WARNING, logger="ops.cpu"):
        assert cpu.load("small") is None and cpu.load("other") is None
    assert len(attempts) == 1
    assert "status -9" in cpu.unavailable_reason("other")
    assert len(caplog.records) == 1
    assert not list(cpu.cache_dir().glob(f"{cache._SCRATCH_PREFIX}*"))

    monkeypatch.setattr(compiler, "run", works)
    new_process()
    assert cpu.load("small").answer() == 42
    assert cpu.status("small").instruction_set == cpu.instruction_set()


def test_unknown_kernel(sources):
    with pytest.raises(ValueError, match="'other'.*small"):
        cpu.load("other")


def test_cache_dir(monkeypatch, tmp_path):
    monkeypatch.delenv("VISION_BACKBONES_CACHE_DIR", raising=False)
    if sys.platform not in ("darwin", "win32"):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        assert cpu.cache_dir() == tmp_path / "vision-backbones" / "native"
    monkeypatch.setenv("VISION_BACKBONES_CACHE_DIR", str(tmp_path / "mine"))
    assert cpu.cache_dir() == tmp_path / "mine" / "native"


def test_concurrent_processes_build_once(sources, tmp_path):
    """All of them get the library, one of them compiles it."""
    # What they import is imported once, before they fork.
    code = (
        "import logging, os; logging.basicConfig(level=logging.INFO)\n"
        f"os.environ.clear(); os.environ.update({dict(os.environ)!r})\n"
        "from pathlib import Path; from ops.cpu import build, libraries\n"
        f"libraries.SOURCES = Path({str(sources)!r})\n"
        "for _ in range(3):\n"
        "    if not os.fork():\n"
        "        assert build.load('small').answer() == 42\n"
        "        os._exit(0)\n"
        "print([os.wait()[1] for _ in range(3)])\n"
    )
    said = run_code(code, tmp_path)
    assert said.endswith("[0, 0, 0]\n"), said
    assert said.count("Compiled the small kernel") == 1
    assert len(list(cpu.cache_dir().glob("*.so"))) == 1


def test_concurrent_threads_load_once(compilations):
    threads = [threading.Thread(target=cpu.load, args=("small",)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(compilations) == 1
    assert cpu.load("small").answer() == 42


def test_a_fork_does_not_wait_for_a_thread_of_its_parent(compilations, monkeypatch):
    monkeypatch.setattr(build, "_kernels_lock", threading.Lock())
    with build._kernels_lock:
        build._reset_after_fork()
        assert cpu.load("small").answer() == 42


def test_a_signal_while_compiling_leaves_nothing_behind(compilations, monkeypatch):
    sent = []
    monkeypatch.setattr(compiler.os, "kill", lambda pid, number: sent.append((pid, number)))
    monkeypatch.setattr(compiler, "run", lambda *_: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(compiler._Signal):
        cpu.load("small")
    assert sent == [(os.getpid(), signal.SIGTERM)]  # which ends the process, once all is clean
    assert [path.suffix for path in cpu.cache_dir().iterdir()] == [".lock"]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_plain_layers_run_at_once_where_nothing_can_be_compiled(monkeypatch, sources, caplog):
    for kernel in ("neighborhood", "other"):
        (sources / "any" / f"{kernel}.cpp").write_text("")
    attempts = []

    def full(words, scratch):
        attempts.append(words)
        Path(words[-1]).write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device", str(scratch.parent))

    monkeypatch.setattr(compiler, "run", full)
    x = random(1, 5, 6, 2, 4).float()
    with caplog.at_level(logging.WARNING, logger="ops.cpu"):
        out = na2d(x, x, x, 3)
        assert cpu.load("other") is None
    torch.testing.assert_close(out, na2d(x, x, x, 3, backend="reference"))
    # The cache, two private folders, one of this process: each is tried once.
    assert len(attempts) == 4
    assert [r.getMessage().count("No space left") for r in caplog.records] == [4]
    assert not list(sources.parent.glob(f"**/{cache._SCRATCH_PREFIX}*"))
    assert not list(sources.parent.glob("**/*.so"))


def test_every_kernel_of_the_package_stands_alone():
    """No header of torch or Python: one library serves every version of them."""
    for source in [*libraries.SOURCES.rglob("*.cpp"), *libraries.SOURCES.rglob("*.h")]:
        text = source.read_text()
        assert "torch/" not in text and "Python.h" not in text and "ATen" not in text, source
