"""Running the compiler: failure messages."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from ops.cpu.build import compiler


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
        assert caught.value.errno == errno.ENOSPC
        assert caught.value.filename == str(tmp_path)
        assert caught.value.strerror in said
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


def test_a_killed_compiler(tmp_path: Path) -> None:
    with pytest.raises(compiler.CompilerError, match="status -9"):
        compiler.run(script(tmp_path, "kill -9 $$"), scratch(tmp_path))


def test_messages_of_any_encoding(tmp_path: Path) -> None:
    with pytest.raises(compiler.RefusedError, match="error: \ufffd"):
        compiler.run(script(tmp_path, r"printf 'error: \377' >&2; exit 1"), scratch(tmp_path))


def test_temporary_files_go_to_the_scratch_folder(tmp_path: Path) -> None:
    folder = scratch(tmp_path)
    compiler.run(script(tmp_path, 'echo x > "$TMPDIR/left.s"'), folder)
    assert [path.name for path in folder.iterdir()] == ["left.s"]


def test_a_hung_compiler_is_killed(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(compiler, "_TIMEOUT_S", 0.3)
    with pytest.raises(compiler.CompilerError, match="did not end within"):
        compiler.run(script(tmp_path, "exec sleep 60"), scratch(tmp_path))
