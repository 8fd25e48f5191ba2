"""Shards are written whole or not at all, and in groups of rows."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest

from backbones.embedding import shard_writer, table
from backbones.embedding.shard_writer import ShardWriter


def _write(path: Path, rows: int) -> None:
    with ShardWriter(path, table.schema(4), "x") as shard:
        for row in range(rows):
            shard.add([f"{row}.png"], [(1, 1)], np.full((1, 4), row, np.float32))


def test_errors_leave_no_files(tmp_path):
    path = tmp_path / "part.parquet"
    with pytest.raises(ZeroDivisionError), ShardWriter(path, table.schema(4), "x") as shard:
        shard.add(["a"], [(1, 1)], np.zeros((1, 4), np.float32))
        raise ZeroDivisionError
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(("size", "groups"), [(1 << 25, 1), (16, 3), (32, 2)])
def test_large_groups_are_written_as_they_come(size, groups, tmp_path, monkeypatch):
    """Maps of many images are not accumulated in memory."""
    monkeypatch.setattr(shard_writer, "_GROUP", size)
    path = tmp_path / "part.parquet"
    _write(path, 3)
    file = pyarrow.parquet.ParquetFile(path)
    assert file.num_row_groups == groups
    assert file.read().column("key").to_pylist() == ["0.png", "1.png", "2.png"]
