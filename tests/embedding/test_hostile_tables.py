"""Any metadata and any shards: a table that loads, or an error in one line that changes nothing."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from embedding_tables import make_table, rewrite
from fuzzing import damage, fuzz
from hypothesis import given

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


@pytest.mark.parametrize("signed", [True, False])
def test_any_shard(signed, folder):
    """Without a checksum, as of an earlier version, only Arrow and the checks of rows notice."""
    path, seen = table.shard_path(folder, 1), list[bool]()
    wanted = table.load(folder)
    if not signed:
        rewrite(path)
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
COMMANDS = [
    *("search --key a/0.png", "search --key a/0.png --index hnsw", "search --query a.png"),
    *("duplicates", "probe --labels folder"),
]


@pytest.mark.parametrize("name", ["metadata.json", "shards/part-00001.parquet"])
@pytest.mark.parametrize("kind", SPOILT)
def test_commands_say_it_in_a_line(kind, name, folder, capsys, monkeypatch):
    monkeypatch.chdir(folder.parent)
    Path("a.png").write_bytes(b"no image")
    (folder / name).unlink()
    SPOILT[kind](folder / name)
    before = set(folder.rglob("*"))
    for command, *words in map(str.split, COMMANDS):
        assert main([command, str(folder), *words]) == 2
        said = capsys.readouterr()
        assert said.out == "" and said.err.startswith("error: ") and said.err.count("\n") == 1
    assert set(folder.rglob("*")) == before
