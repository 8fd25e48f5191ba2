"""A full disk ends a run with a one-line error; earlier files remain."""

from __future__ import annotations

import pytest
from faults import files_that_may_not_grow
from training_runs import make_images, same


@pytest.fixture
def images(tmp_path):
    return make_images(tmp_path / "images", {"train": 20, "val": 3})


@pytest.mark.parametrize("size", [200, 20_000])
def test_earlier_files_remain(size, runs):
    """The recipe does not fit into 200 bytes, the weights not into 20 000."""
    runs.train("--save-every-steps=1", "--epochs=1")
    before, best = runs.state(), (runs.folder / "best.safetensors").read_bytes()
    with files_that_may_not_grow(size):
        said = runs.refuse("--save-every-steps=1", "--epochs=2", "--resume=auto")
    assert f"allows no file of this size in {runs.folder} (File too large)" in said
    assert "the existing file is unchanged" in said
    assert same(runs.state(), before)
    assert (runs.folder / "best.safetensors").read_bytes() == best
    assert not list(runs.folder.glob(".*"))


@pytest.mark.parametrize("name", ["metrics.jsonl", "corrupt_train.txt"])
@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_lists_that_grow(name, workers, images, runs):
    next(images.glob("train/*/*.png")).write_bytes(b"no image")
    runs.folder.mkdir()
    (runs.folder / name).symlink_to("/dev/full")
    words = ("--resume=auto", "--epochs=2", "--max-corrupt=1", f"--workers={workers}")
    said = runs.refuse(*words)
    assert "No space left on device" in said
    assert str(runs.folder) in said or workers
