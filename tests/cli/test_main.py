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
def test_help_is_short_and_has_an_example(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "example:" in said
    lines = said.splitlines()
    assert len(lines) <= 45
    assert all(len(line) <= 100 for line in lines)


def test_the_package_is_a_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As ``python -m backbones.cli`` runs it, without the seconds of another process's imports."""
    monkeypatch.setattr(sys, "argv", ["backbones.cli", "--help"])
    with pytest.raises(SystemExit) as leaving:
        runpy.run_module("backbones.cli", run_name="__main__", alter_sys=True)
    assert not leaving.value.code
    said = capsys.readouterr().out
    assert all(name in said for name in COMMANDS)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["sumary"], "no command 'sumary'; did you mean summary?"),
        (["summary", "van_b9"], "unknown model 'van_b9'; did you mean 'van_b"),
        (["summary", "nonsense"], "unknown model 'nonsense'; backbones.list_models() lists all"),
        (["sum\nmary"], "no command 'sum\\nmary'"),
        (["summary", ""], "unknown model ''"),
        (["summary", "van_b0", "--size", "0"], "--size takes one side"),
        (["summary", "van_b0", "--size", "1", "2", "3"], "--size takes one side"),
        (["summary", "van_b0", "--size", "100000"], "of 1 to 65535 pixels, got [100000]"),
        (["summary", "van_b0", "--size", "65535"], "--size 65535 65535: an image of that size"),
        (["summary", "van_b0", "--size", "x"], "argument --size: invalid int value: 'x'"),
        (["summary", "van_b0", "--runs", "-1"], "--runs must be at least 0, not -1"),
        (["summary"], "the following arguments are required: model"),
        (["summary", "van_b0", "--nonsense"], "unrecognized arguments: --nonsense"),
        (["predict", "no.png", "--model", "van_b0"], "no image at no.png"),
        (["predict", str(ROOT / "README.md")], "give --model NAME"),
        (["predict", ""], "IMAGE must be the name of a file or folder, not ''"),
        (["predict", "x", "--labels", ""], "--labels must be the name of a file or folder"),
        (["predict", "x", "--topk", "0"], "--topk must be at least 1, not 0"),
        (["predict", "x", "--device", "meta"], "--device meta cannot be used here"),
        (["upscale", "", "--model", "hat_x2", "--out", "x"], "IN must be the name of"),
        (["upscale", "x", "--model", "hat_x2", "--out", ""], "--out must be the name"),
        (["validate", "--data", ""], "--data must be the name of a file or folder"),
        (["validate", "--data", "digits", "--split", ""], "--split must be the name of a split"),
        (
            ["validate", "--data", "digits", "--threads", "0"],
            "--threads must be within 1 … 1024, not 0",
        ),
        (["benchmark", "--models", "van_b9"], "unknown models van_b9; see backbones.list_models()"),
        (["benchmark", "--compare", "no.json"], "--compare: there is no file no.json"),
        (["benchmark", "--threads", "0"], "--threads must be within 1 … 1024, not 0"),
        (["benchmark", "--against", ""], "--against: Empty module name"),
        (["verify", "--checkpoint", "no.pth"], "no checkpoint at no.pth"),
        (["verify", ""], "unknown model ''"),
        (["verify"], "give a MODEL"),
        (["export", "van_b0", "--out", "no/such/x.onnx"], "there is no folder no/such"),
        (["export", "van_b0", "--out", "x.pt2", "--int8"], "--int8 requires ONNX"),
    ],
)
def test_user_errors_are_one_line(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert said in line


def test_the_guide_has_every_command() -> None:
    guide = (ROOT / "docs" / "guides" / "command_line.md").read_text()
    assert all(f"| `{name}` |" in guide for name in COMMANDS)


def test_interrupting_is_quiet(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from backbones.cli import doctor

    def interrupted(options: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "run", interrupted)
    assert main(["doctor"]) == 130
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
@pytest.mark.parametrize(
    "words", [["--help"], ["summary", "shvit_s1", "--runs", "0"], ["doctor"]], ids=" ".join
)
def test_output_in_other_encodings(
    words: list[str], encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on Windows, where output that goes to a file is in cp1252."""
    stream = Stream(encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    assert main(words) in (0, 1)
    said = stream.said().decode(encoding)
    assert said.endswith("\n")
    assert "\\u" not in said


def test_output_to_a_full_disk(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert main(["summary", "shvit_s1", "--runs", "0"]) == 2
        monkeypatch.undo()
    assert capsys.readouterr().err == "error: cannot write the output: No space left on device\n"


def test_missing_packages_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "backbones.cli.summary", None)
    monkeypatch.setattr(command, "explanation", lambda error: f"it needs x: {error}")
    assert main(["summary", "van_b0"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: it needs x: ")


def test_bugs_print_a_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    from backbones.cli import doctor

    def wrong(options: object) -> int:
        raise ValueError("not for users")

    monkeypatch.setattr(doctor, "run", wrong)
    with pytest.raises(ValueError, match="not for users"):
        command.run_command("doctor", [])
