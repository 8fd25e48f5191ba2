"""Building kernels: once, atomically, beside other processes, and quietly not at all."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ops import native
from ops.native import build

ROOT = Path(__file__).parents[2]

# A kernel that compiles in no time, to take the place of the real ones.
SOURCE = 'extern "C" int answer() { return 42; }\n'


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """A folder of sources and an empty cache, both of this test alone."""
    folder = tmp_path / "sources"
    folder.mkdir()
    (folder / "small.cpp").write_text(SOURCE)
    monkeypatch.setattr(build, "_SOURCES", folder)
    monkeypatch.setattr(build, "_kernels", {})
    monkeypatch.setenv("VISION_BACKBONES_CACHE_DIR", str(tmp_path / "cache"))
    for name in ("VISION_BACKBONES_NATIVE", "VISION_BACKBONES_NATIVE_ISA", "CXX"):
        monkeypatch.delenv(name, raising=False)
    return folder


def _forget(monkeypatch):
    monkeypatch.setattr(build, "_kernels", {})


def test_builds_once_and_says_so(sources, monkeypatch, caplog):
    with caplog.at_level(logging.INFO, logger="ops.native"):
        assert native.load("small").answer() == 42
    assert len(caplog.records) == 1
    assert "Compiled the small kernel" in caplog.text
    assert native.unavailable_reason("small") is None
    # Nothing but the library and its lock is left behind.
    names = sorted(p.name for p in native.cache_dir().iterdir())
    assert [Path(name).suffix for name in names] == [".lock", ".so"]

    caplog.clear()
    _forget(monkeypatch)
    monkeypatch.setattr(build, "_compile", None)  # not called again
    with caplog.at_level(logging.INFO, logger="ops.native"):
        assert native.load("small").answer() == 42
    assert not caplog.records


def test_a_changed_source_or_header_is_built_anew(sources, monkeypatch):
    assert native.load("small").answer() == 42
    _forget(monkeypatch)
    (sources / "value.h").write_text("#define VALUE 43\n")
    (sources / "small.cpp").write_text(
        '#include "value.h"\nextern "C" int answer() { return VALUE; }\n'
    )
    assert native.load("small").answer() == 43
    _forget(monkeypatch)
    (sources / "value.h").write_text("#define VALUE 44\n")
    assert native.load("small").answer() == 44
    assert len(list(native.cache_dir().glob("*.so"))) == 3


def test_no_compiler(sources, monkeypatch, caplog):
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    with caplog.at_level(logging.INFO, logger="ops.native"):
        assert native.load("small") is None
        assert native.load("small") is None
    assert "no C++ compiler" in native.unavailable_reason("small")
    assert len(caplog.records) == 1 and caplog.records[0].levelno == logging.INFO


def test_source_that_does_not_compile(sources):
    (sources / "small.cpp").write_text("this is not C++\n")
    assert native.load("small") is None
    assert "error" in native.unavailable_reason("small")
    assert not list(native.cache_dir().glob("*.so"))


def test_compiler_without_openmp(sources, monkeypatch, tmp_path, caplog):
    compiler = tmp_path / "plain c++"
    compiler.write_text(
        '#!/bin/sh\nfor a in "$@"; do [ "$a" = -fopenmp ] && { echo "error: no" >&2; exit 1; }; '
        'done\nexec c++ "$@"\n'
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", f"'{compiler}'")
    with caplog.at_level(logging.INFO, logger="ops.native"):
        assert native.load("small").answer() == 42
    assert f"{compiler} without OpenMP" in caplog.text


def test_compiler_of_the_environment_that_does_not_exist(sources, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler -O1")
    assert native.load("small").answer() == 42


def test_switched_off(sources, monkeypatch):
    monkeypatch.setenv("VISION_BACKBONES_NATIVE", "0")
    assert native.load("small") is None
    assert "VISION_BACKBONES_NATIVE=0" in native.unavailable_reason("small")
    assert not native.cache_dir().exists()


def test_cache_that_cannot_be_written(sources, monkeypatch, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("VISION_BACKBONES_CACHE_DIR", str(blocked))
    assert native.load("small") is None
    assert str(blocked) in native.unavailable_reason("small")


def test_damaged_library_is_replaced(sources):
    isa = native.instruction_set()
    path = native.cache_dir() / f"small-{isa}-{build._key('small', isa)}{build._suffix()}"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"not a library")
    assert native.load("small").answer() == 42
    assert native.status("small").path == path


def test_instruction_set(sources, monkeypatch):
    best = native.instruction_set()
    monkeypatch.setenv("VISION_BACKBONES_NATIVE_ISA", "portable")
    assert native.instruction_set() == "portable"
    assert native.status("small").path.name.startswith("small-portable-")
    monkeypatch.setenv("VISION_BACKBONES_NATIVE_ISA", next(iter(build._ISA_FLAGS)))
    assert native.instruction_set() == best  # never more than the CPU has
    monkeypatch.setenv("VISION_BACKBONES_NATIVE_ISA", "sse2")
    with pytest.raises(ValueError, match="sse2"):
        native.instruction_set()


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
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bfloat16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: tiles)
    assert native.instruction_set() == expected


def test_compiler_that_does_not_know_the_instructions(sources, monkeypatch, tmp_path):
    """What it knows is taken instead."""
    compiler = tmp_path / "old c++"
    compiler.write_text(
        '#!/bin/sh\nfor a in "$@"; do [ "$a" = -mavx2 ] && { echo "error: no" >&2; exit 1; }; '
        'done\nexec c++ "$@"\n'
    )
    compiler.chmod(0o755)
    monkeypatch.setattr(build, "_compilers", lambda: [[str(compiler)]])
    assert native.load("small").answer() == 42
    assert native.status("small").instruction_set == "portable"


def test_unknown_kernel(sources):
    with pytest.raises(ValueError, match="'other'.*small"):
        native.load("other")


def test_cache_dir(monkeypatch, tmp_path):
    monkeypatch.delenv("VISION_BACKBONES_CACHE_DIR", raising=False)
    if sys.platform not in ("darwin", "win32"):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        assert native.cache_dir() == tmp_path / "vision-backbones" / "native"
    monkeypatch.setenv("VISION_BACKBONES_CACHE_DIR", str(tmp_path / "mine"))
    assert native.cache_dir() == tmp_path / "mine" / "native"


def test_processes_that_build_at_once(sources, tmp_path):
    """All of them get the library, one of them compiles it."""
    code = (
        "import logging, sys; logging.basicConfig(level=logging.INFO)\n"
        "from pathlib import Path; from ops.native import build\n"
        f"build._SOURCES = Path({str(sources)!r})\n"
        "assert build.load('small').answer() == 42\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code], env=environment, stderr=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    errors = [p.communicate(timeout=120)[1] for p in processes]
    assert [p.returncode for p in processes] == [0, 0, 0], errors
    assert sum(e.count("Compiled the small kernel") for e in errors) == 1
    assert len(list(native.cache_dir().glob("*.so"))) == 1


def test_every_kernel_of_the_package_stands_alone():
    """No header of torch or Python: one library serves every version of them."""
    for source in [*build._SOURCES.glob("*.cpp"), *build._SOURCES.glob("*.h")]:
        text = source.read_text()
        assert "torch/" not in text and "Python.h" not in text and "ATen" not in text, source
