"""After SIGKILL at any moment, the same command resumes, and no row is lost or duplicated."""

from __future__ import annotations

import functools
import os
import random
import signal
import time
from pathlib import Path

import pytest
from embedding_runs import decode_slowly, make_photos, same, start, words
from faults import files_that_may_not_grow
from training_runs import PATIENCE, Run, kill_at_call

from backbones.cli.main import main
from backbones.embedding import table


def _shards(out: Path) -> int:
    return len(list((out / "shards").glob("[!.]*"))) if (out / "shards").is_dir() else 0


def _kill_somewhere(process: Run, out: Path, chance: random.Random) -> bool:
    """Kill it at startup or at some moment after its next shard; returns whether it still ran."""
    before, until = _shards(out), time.monotonic() + PATIENCE
    if chance.random() < 0.25:
        time.sleep(chance.uniform(0, 0.5))
    else:
        while _shards(out) == before and process.is_alive() and time.monotonic() < until:
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.05))
    running = process.is_alive()
    process.kill()
    process.join()
    return running


@pytest.mark.parametrize(
    ("kills", "workers"),
    [
        (1, 1),
        pytest.param(12, 1, marks=pytest.mark.slow),
        # Each run starts two more processes that import torch.
        pytest.param(10, 2, marks=[pytest.mark.slow, pytest.mark.timeout(1200)]),
    ],
)
def test_killed_at_random_moments(kills, workers, checkpoint, tmp_path):
    """With two workers, these outlive their parent briefly, while its successor's already run."""
    photos = make_photos(tmp_path / "photos", 24 * kills)
    (photos / "none.jpg").write_text("no image")
    (photos / "sub" / "none.png").write_text("no image")
    assert main(words(photos, tmp_path / "undisturbed", checkpoint)) == 1
    out, chance = tmp_path / "out", random.Random(kills)
    argv = words(photos, out, checkpoint, f"--workers={workers}")
    for _ in range(kills):
        assert _kill_somewhere(start(argv, decode_slowly), out, chance), "it was done too soon"
        assert not (out / table.METADATA).exists() or table.metadata(out)["dim"] == 32
    assert _shards(out) < 6 * kills + 1, "nothing was left to do"
    last = start(argv)
    last.join()
    assert last.exitcode == 1
    assert same(out, tmp_path / "undisturbed")
    keys, _ = table.load(out)
    assert len(set(keys)) == len(keys) == 24 * kills
    corrupt = (out / "corrupt.txt").read_text()
    assert corrupt == (tmp_path / "undisturbed" / "corrupt.txt").read_text()
    assert [line.split("\t")[0] for line in corrupt.splitlines()] == ["none.jpg", "sub/none.png"]
    assert not list(out.rglob(".*"))


@pytest.mark.parametrize(("name", "number"), [("fsync", 0), ("replace", 1), ("fsync", 5)])
def test_killed_as_it_writes(name, number, photos, checkpoint, tmp_path):
    """Killed before and after each step that puts metadata, the list or a shard in place."""
    argv = words(photos, tmp_path / "out", checkpoint)
    process = start(argv, functools.partial(kill_at_call, name, number))
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert main(argv) == 0
    assert main(words(photos, tmp_path / "undisturbed", checkpoint)) == 0
    assert same(tmp_path / "out", tmp_path / "undisturbed")
    assert not list((tmp_path / "out").rglob(".*"))


@pytest.mark.slow
def test_workers_end_with_their_parent(checkpoint, tmp_path):
    photos = make_photos(tmp_path / "photos", 200)
    out = tmp_path / "out"
    process = start(words(photos, out, checkpoint, "--workers=2"))
    until = time.monotonic() + PATIENCE
    while not _shards(out) and time.monotonic() < until:
        time.sleep(0.01)
    group = process.pid
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    while time.monotonic() < until:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            break
        time.sleep(0.05)
    else:
        os.killpg(group, signal.SIGKILL)
        raise AssertionError("they went on")
    assert _shards(out) < 50


# -- a full disk: a line that names the folder -----------------------------------------------------


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
