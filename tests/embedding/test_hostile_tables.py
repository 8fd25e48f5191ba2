"""Any metadata and any shards: a table that loads, or an error in one line that changes nothing."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
from embedding_tables import make_table
from fuzzing import anything, damage, fuzz
from hypothesis import given
from hypothesis import strategies as st

from backbones.cli.main import main
from backbones.embedding import table

EXAMPLES = 100


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    keys = [f"{'ab'[row % 2]}/{row}.png" for row in range(9)]
    return make_table(tmp_path / "table", np.eye(9, dtype=np.float32), keys, rows=3)


def loads(folder: Path) -> bool:
    """Whether a table loads; the reason is a line."""
    try:
        table.load(folder)
    except (table.TableError, FileNotFoundError) as error:
        assert "\n" not in str(error) and len(str(error)) < 1000
        return False
    return True


ANY_TEXT = st.one_of(
    st.text(max_size=8),
    st.text(st.characters(), max_size=4),  # surrogates, too
    st.sampled_from(["", "320", "/etc", "../..", "a\0b", "\ud800", "nan", "float16", "int8"]),
    st.sampled_from(["folder", "list", "tar", "parquet", "training", "digits", "hfds/x"]),
)


@st.composite
def edits(draw: st.DrawFn, content: Any) -> str:
    """The text of a ``metadata.json`` with other values, fewer fields or other characters."""
    content = json.loads(json.dumps(content))
    for _ in range(draw(st.integers(1, 2))):
        inner = content
        name = draw(st.sampled_from(sorted(inner)))
        while isinstance(inner[name], dict) and inner[name] and draw(st.integers(0, 3)):
            inner = inner[name]
            name = draw(st.sampled_from(sorted(inner)))
        if draw(st.integers(0, 5)):
            inner[name] = draw(anything(ANY_TEXT))
        elif len(content) > 1:
            del inner[name]
    text = json.dumps(content, ensure_ascii=draw(st.booleans()))
    if not draw(st.integers(0, 4)):
        start = draw(st.integers(0, len(text)))
        end = draw(st.integers(start, min(len(text), start + 20)))
        text = text[:start] + draw(ANY_TEXT) + text[end:]
    return text


def test_any_metadata(folder):
    path, seen = folder / "metadata.json", list[bool]()

    @fuzz(EXAMPLES)
    @given(edits(json.loads(path.read_text())))
    def one(text: str) -> None:
        path.write_bytes(text.encode(errors="surrogatepass"))
        seen.append(loads(folder))

    one()
    assert seen.count(False) > EXAMPLES // 4 and seen.count(True) > EXAMPLES // 50


@pytest.mark.parametrize("signed", [True, False])
def test_any_shard(signed, folder):
    """Without a checksum, as of an earlier version, only Arrow and the checks of rows notice."""
    path, seen = table.shard_path(folder, 1), list[bool]()
    wanted = table.load(folder)
    if not signed:
        with pyarrow.parquet.ParquetFile(path) as file:
            whole, kept = file.read(), file.metadata.metadata
        kept = {key: kept[key] for key in (table.IDENTITY_KEY, table.CORRUPT_KEY)}
        pyarrow.parquet.write_table(whole.replace_schema_metadata(kept), path, compression="none")
    data = path.read_bytes()

    @fuzz(EXAMPLES)
    @given(damage())
    def one(change: Callable[[bytes], bytes]) -> None:
        path.write_bytes(change(data))
        seen.append(loads(folder))
        if signed and seen[-1]:  # nothing that counts has changed
            keys, vectors = table.load(folder)
            assert keys == wanted[0] and np.array_equal(vectors, wanted[1])

    one()
    assert seen.count(False) > EXAMPLES // 4


SPOILT: dict[str, Callable[[Path], object]] = {
    "cut": lambda path: path.write_bytes(b"PAR1 and no more"),
    "pipe": os.mkfifo,
    "folder": Path.mkdir,
    "loop": lambda path: path.symlink_to(path.name),
    "device": lambda path: path.symlink_to("/dev/zero"),
    "gone": lambda path: None,
}
COMMANDS = {
    "search": ["--key", "a/0.png"],
    "hnsw": ["--key", "a/0.png", "--index", "hnsw"],
    "query": ["--query", "{0}/a.png"],
    "duplicates": ["--csv", "{0}/a.csv"],
    "probe": ["--labels", "folder"],
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", ["metadata.json", "shards/part-00001.parquet"])
@pytest.mark.parametrize("kind", SPOILT)
def test_commands_say_it_in_a_line(kind, name, command, folder, tmp_path, capsys):
    (tmp_path / "a.png").write_bytes(b"no image")
    (folder / name).unlink()
    SPOILT[kind](folder / name)
    before = set(folder.rglob("*"))
    words = [word.format(tmp_path) for word in COMMANDS[command]]
    command = {"hnsw": "search", "query": "search"}.get(command, command)
    assert main([command, str(folder), *words]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("error: ") and said.err.count("\n") == 1
    assert set(folder.rglob("*")) == before
