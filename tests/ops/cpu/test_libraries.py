"""Shipped libraries: preferred, and never stale."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from ops import cpu
from ops.cpu import compiler, instruction_sets, libraries

_which = shutil.which


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a wheel's libraries lie, and a machine without a compiler."""
    folder = tmp_path / "compiled"
    folder.mkdir()
    monkeypatch.setattr(libraries, "SHIPPED", folder)
    monkeypatch.setattr(compiler.shutil, "which", lambda name: None)
    return folder


def _ship(package: Path, library: Path, isa: str) -> Path:
    return Path(shutil.copyfile(library, package / f"{libraries.stem('small', isa)}.so"))


def test_a_library_of_the_package_needs_no_compiler(sources, package, compiled) -> None:
    path = _ship(package, compiled[42], cpu.instruction_set())
    assert cpu.load("small").answer() == 42
    kernel = cpu.status("small")
    assert (kernel.path, kernel.instruction_set) == (path, cpu.instruction_set())
    assert not cpu.cache_dir().exists()


def test_the_richest_instructions_of_this_cpu_are_chosen(
    sources, package, compiled, monkeypatch, new_process
) -> None:
    for isa in cpu.levels():
        _ship(package, compiled[42], isa)
    for isa in instruction_sets.candidates():
        monkeypatch.setenv("VISION_BACKBONES_NATIVE_ISA", isa)
        new_process()
        assert cpu.load("small").answer() == 42
        assert cpu.status("small").instruction_set == isa


def test_it_comes_before_what_was_compiled(compilations, package, compiled) -> None:
    _ship(package, compiled[13], cpu.instruction_set())
    assert cpu.load("small").answer() == 13
    assert not compilations


@pytest.mark.parametrize("changed", ["source", "flags"])
def test_a_stale_library_is_not_loaded(changed, sources, package, compiled, monkeypatch) -> None:
    _ship(package, compiled[13], cpu.instruction_set())
    if changed == "source":
        (sources / "any" / "small.cpp").write_text('extern "C" int answer() { return 7; }\n')
    else:
        monkeypatch.setattr(instruction_sets, "COMMON_FLAGS", ["-O1", "-fPIC", "-shared"])
    assert cpu.load("small") is None


def test_a_library_that_does_not_load_here_is_compiled(sources, package, monkeypatch) -> None:
    path = package / f"{libraries.stem('small', cpu.instruction_set())}.so"
    path.write_bytes(b"the code of another system")
    monkeypatch.setattr(compiler.shutil, "which", _which)
    assert cpu.load("small").answer() == 42
    assert cpu.status("small").path.parent == cpu.cache_dir()
    assert path.exists()


def test_switched_off_means_those_of_the_package_too(
    sources, package, compiled, monkeypatch
) -> None:
    _ship(package, compiled[42], cpu.instruction_set())
    monkeypatch.setenv("VISION_BACKBONES_NATIVE", "0")
    assert cpu.load("small") is None


@pytest.mark.parametrize("name", sorted(libraries.sources()))
def test_glibc_symbols_match_the_wheel_tag(name: str) -> None:
    """manylinux_2_28; what a newer one has in place of it is named by its version."""
    path = cpu.status(name).path
    assert path is not None
    versions = re.findall(rb"GLIBC_2\.(\d+)", path.read_bytes())
    assert max(map(int, versions), default=0) <= 28
