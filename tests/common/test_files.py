"""Files: what is wrong with one; written whole or not at all."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path

import pytest

from backbones.common.errors import FileError
from backbones.common.files import file_problem, replacing, replacing_together, writing


def test_not_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    with socket.socket(socket.AF_UNIX) as there:
        before = Path.cwd()
        os.chdir(tmp_path)  # the name of a socket must be short
        there.bind("socket")
        os.chdir(before)
    said = {p.name: file_problem(p) for p in tmp_path.iterdir()}
    assert said.pop("loop") is not None
    assert said == {
        "file": None,
        "pipe": "is a named pipe",
        "link": "is a broken link",
        "socket": "is a socket",
    }
    assert file_problem(tmp_path) == "is a folder"
    assert file_problem("/dev/zero") == "is a device"
    assert file_problem("/dev/null/x") is not None


def test_files_that_are_written_together(tmp_path):
    path = tmp_path / "x.onnx"
    with (
        pytest.raises(FileError, match=f"cannot write {path}: no space is left in {tmp_path}"),
        replacing_together(path) as scratch,
    ):
        scratch.write_text("half")
        try:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise RuntimeError("the writer failed") from error
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(KeyError), replacing_together(path):
        raise KeyError("no matter of the disk")
    with replacing_together(path) as scratch:
        for name in ("x.onnx", "x.onnx.data", "log"):
            scratch.with_name(name).touch()
    assert {p.name for p in tmp_path.iterdir()} == {"x.onnx", "x.onnx.data"}


@pytest.mark.parametrize("unique", [False, True])
def test_a_file_is_replaced_whole_or_not_at_all(unique, tmp_path):
    (tmp_path / "file").write_text("old")
    (tmp_path / "link").symlink_to("file")
    with pytest.raises(KeyError), replacing(tmp_path / "link", unique) as temporary:
        temporary.write_text("ha")
        raise KeyError
    assert (tmp_path / "file").read_text() == "old"
    with replacing(tmp_path / "link", unique) as temporary:
        temporary.write_text("new")
        assert (tmp_path / "file").read_text() == "old"
    assert (tmp_path / "file").read_text() == "new"
    assert {path.name for path in tmp_path.iterdir()} == {"file", "link"}


def test_two_writers_of_a_file_do_not_meet(tmp_path):
    with replacing(tmp_path / "file", unique=True) as one:
        with replacing(tmp_path / "file", unique=True) as other:
            one.write_text("one")
            other.write_text("other")
        assert (tmp_path / "file").read_text() == "other"
    assert (tmp_path / "file").read_text() == "one"


def test_only_failures_to_write_become_file_errors(tmp_path):
    (tmp_path / "file").write_text("")
    said = "file: Permission denied; the existing file is unchanged$"
    with pytest.raises(FileError, match=said), writing(tmp_path / "file"):
        raise PermissionError(errno.EACCES, "Permission denied")
    with pytest.raises(RuntimeError, match="^of the GPU$"), writing(tmp_path / "file"):
        raise RuntimeError("of the GPU")
