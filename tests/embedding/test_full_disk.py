"""On a full disk, `embed` fails with one line that names the folder, and can be resumed."""

from __future__ import annotations

import pytest
from embedding_runs import same, words
from faults import files_that_may_not_grow

from backbones.cli.main import main


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("size", [100, 1500])
def test_finished_shards_remain(size, workers, photos, checkpoint, tmp_path, capsys):
    """100 bytes are too few for the metadata, 1500 for a shard."""
    out = tmp_path / "out"
    argv = words(photos, out, checkpoint, f"--workers={workers}")
    assert main(words(photos, tmp_path / "undisturbed", checkpoint)) == 0
    capsys.readouterr()
    with files_that_may_not_grow(size):
        assert main(argv) == 2
    said = capsys.readouterr().err
    folder = out if size == 100 else out / "shards"
    assert f"`ulimit -f` or the file system allows no file of this size in {folder} " in said
    assert [line for line in said.splitlines() if line.startswith("error: ")] == [
        said.splitlines()[-1]
    ]
    assert "Traceback" not in said
    assert not list(out.rglob(".*")) if out.exists() else size == 100
    assert main(argv) == 0
    assert same(out, tmp_path / "undisturbed")
