"""The command as a whole: short help, one-line errors."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
from other_encodings import Stream

from backbones.cli import main as command
from backbones.cli.main import COMMANDS, main

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("words", [["--help"], *([name, "--help"] for name in COMMANDS)])
def test_help_is_short_and_has_an_example(words, capsys):
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "example:" in said
    lines = said.splitlines()
    assert len(lines) <= 45
    assert all(len(line) <= 100 for line in lines)


def test_the_package_is_a_command(monkeypatch, capsys):
    """As ``python -m backbones.cli`` runs it, without the seconds of another process's imports."""
    monkeypatch.setattr(sys, "argv", ["backbones.cli", "--help"])
    with pytest.raises(SystemExit) as leaving:
        runpy.run_module("backbones.cli", run_name="__main__", alter_sys=True)
    assert not leaving.value.code
    said = capsys.readouterr().out
    assert all(name in said for name in COMMANDS)


def test_the_guide_has_every_command():
    guide = (ROOT / "docs" / "guides" / "command_line.md").read_text()
    assert all(f"| `{name}` |" in guide for name in COMMANDS)


@pytest.mark.parametrize(
    "words", [["--help"], ["summary", "shvit_s1", "--runs", "0"], ["doctor"]], ids=" ".join
)
def test_output_in_another_encoding(words, monkeypatch):
    """Every symbol has a replacement."""
    stream = Stream("ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    assert main(words) in (0, 1)
    said = stream.said().decode("ascii")
    assert said.endswith("\n")
    assert "\\u" not in said


def test_missing_packages_are_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "backbones.cli.summary", None)
    monkeypatch.setattr(command, "explanation", lambda error: f"it needs x: {error}")
    assert main(["summary", "van_b0"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: it needs x: ")
