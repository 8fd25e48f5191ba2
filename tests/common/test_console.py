"""Shared behaviour of all commands: output in any encoding, exit statuses, one-line errors."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable

import pytest
import torch
from other_encodings import Stream

from backbones import CheckpointError
from backbones.common.console import Parser, guard, tolerate_any_text
from backbones.common.errors import CommandError, DataError

TEXT = "─✓× 日 \udcff.png"


@pytest.mark.parametrize(
    ("encoding", "expected"),
    [
        ("cp1252", b"-v\xd7 \\u65e5 \\udcff.png"),
        ("ascii", b"-vx \\u65e5 \\udcff.png"),
        ("utf-8", "─✓× 日 \\udcff.png".encode()),
    ],
)
@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_any_text_can_be_written(encoding, expected, name, monkeypatch):
    stream = Stream(encoding)
    monkeypatch.setattr(sys, name, stream)
    with tolerate_any_text():
        getattr(sys, name).write(TEXT)
    assert stream.said() == expected
    assert stream.errors == "strict"


def raising(error: BaseException) -> Callable[[], int]:
    def command() -> int:
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (CommandError("no"), 2, "error: no"),
        (CheckpointError("a\nb\x1b[0m"), 2, "error: a\\nb\\x1b[0m"),
        (DataError("no data"), 2, "error: no data"),
        (FileNotFoundError(2, "No such file", "x"), 2, "error: [Errno 2] No such file: 'x'"),
        (
            OSError(errno.ENOSPC, "No space left"),
            2,
            "error: cannot write the output: No space left",
        ),
        (MemoryError(), 2, "error: not enough memory"),
        (torch.OutOfMemoryError("2 GiB"), 2, "error: not enough memory: 2 GiB"),
        (RuntimeError("DefaultCPUAllocator: no"), 2, "error: not enough memory: DefaultCPUAlloc"),
        (KeyboardInterrupt(), 130, ""),
        (BrokenPipeError(), 0, ""),
        (SystemExit(), 0, ""),
        (SystemExit(2), 2, ""),
        (SystemExit("gone"), 2, "error: gone"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_exit_statuses(error, status, said, capsys):
    assert guard(raising(error)) == status
    printed = capsys.readouterr()
    assert (printed.out, len(printed.err.splitlines())) == ("", int(bool(said)))
    assert printed.err.startswith(said)


@pytest.mark.parametrize("error", [RuntimeError("a bug"), ValueError("a bug")], ids=repr)
def test_bugs_print_a_traceback(error):
    with pytest.raises(type(error), match="a bug"):
        guard(raising(error))


@pytest.mark.parametrize("size", [10, 100_000])
def test_output_to_a_full_disk_is_reported(size, monkeypatch, capsys):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert guard(lambda: sys.stdout.write("x" * size) * 0) == 2
        monkeypatch.undo()
    said = capsys.readouterr().err
    assert said == "error: cannot write the output: No space left on device\n"


@pytest.mark.parametrize("closed", [True, False])
def test_output_that_nobody_reads(closed, monkeypatch):
    """Closed when the command begins, or a pipe whose reader has gone."""
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as stream:
        monkeypatch.setattr(sys, "stdout", None if closed else stream)
        assert guard(lambda: sys.stdout.write("x") and 1) == 1
        assert not closed or sys.stdout is None
        monkeypatch.undo()


def test_command_line_errors_are_one_line(capsys):
    parser = Parser(prog="x")
    parser.add_argument("--many", type=int, nargs=2)
    assert guard(lambda: parser.parse_args(["--many", "1", "a\nb"])) == 2
    assert capsys.readouterr().err == "error: argument --many: invalid int value: 'a\\nb'\n"
