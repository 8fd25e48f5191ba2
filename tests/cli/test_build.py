"""``vision-backbones build``."""

from __future__ import annotations

from pathlib import Path

import pytest

from backbones.cli.main import main
from ops import cpu
from ops.cpu import build


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The instruction sets that were asked for; no compiler runs."""
    asked: list[str] = []

    def prepare(isa: str) -> Path | None:
        asked.append(isa)
        return None if isa == "portable" else Path("/my kernels")

    monkeypatch.setattr(cpu, "prepare", prepare)
    return asked


def test_this_cpu_by_default(prepared, capsys):
    assert main(["build"]) == 0
    assert prepared == [cpu.instruction_set()]
    said = capsys.readouterr().out
    assert said == f"kernels for {prepared[0]}: in '/my kernels', after 0 s\n"


@pytest.mark.parametrize(
    ("words", "expected"), [(["portable", "portable"], ["portable"]), (["all"], cpu.levels())]
)
def test_selected_instruction_sets(words, expected, prepared, capsys):
    assert main(["build", "--isa", *words]) == 0
    assert prepared == expected
    assert "kernels for portable: shipped with the package\n" in capsys.readouterr().out


def test_kernels_switched_off(monkeypatch, capsys):
    monkeypatch.setenv("VISION_BACKBONES_NATIVE", "0")
    assert main(["build", "--isa", "portable"]) == 2
    said = capsys.readouterr().err
    assert said == "error: no kernels for portable: switched off by VISION_BACKBONES_NATIVE=0\n"


@pytest.mark.parametrize(
    ("variable", "value"),
    [("VISION_BACKBONES_NATIVE", "maybe"), ("VISION_BACKBONES_NATIVE_ISA", "sse2")],
)
def test_invalid_variables_are_one_line(variable, value, monkeypatch, capsys):
    monkeypatch.setenv(variable, value)
    monkeypatch.setattr(build.process, "states", {})  # nothing is loaded yet
    assert main(["build"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {variable} must be one of [")
    assert said.endswith(f"got {value!r}\n") and said.count("\n") == 1
