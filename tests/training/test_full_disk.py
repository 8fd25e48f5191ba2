"""A full disk ends a run with a one-line error; earlier files remain."""

from __future__ import annotations

import pytest
from faults import files_that_may_not_grow
from training_runs import final_state, make_images, same, train


@pytest.fixture
def images(tmp_path):
    return make_images(tmp_path / "images", {"train": 20, "val": 3})


@pytest.mark.parametrize("size", [200, 20_000])
def test_earlier_files_remain(size, images, tmp_path, capsys):
    """The recipe does not fit into 200 bytes, the weights not into 20 000."""
    arguments = (f"--data={images}", f"--output={tmp_path}", "--name=run", "--save-every-steps=1")
    assert train(*arguments, "--epochs=1") == 0
    folder = tmp_path / "run"
    before, best = final_state(folder), (folder / "best.safetensors").read_bytes()
    with files_that_may_not_grow(size):
        assert train(*arguments, "--epochs=2", "--resume=auto") == 2
    said = capsys.readouterr().err
    assert (
        f"allows no file of this size in {folder} (File too large)" in said
        and said.count("\n") == 1
    )
    assert "the existing file is unchanged" in said
    assert same(final_state(folder), before)
    assert (folder / "best.safetensors").read_bytes() == best
    assert not list(folder.glob(".*"))


@pytest.mark.parametrize("name", ["metrics.jsonl", "corrupt_train.txt"])
@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_lists_that_grow(name, workers, images, tmp_path, capsys):
    next(images.glob("train/*/*.png")).write_bytes(b"no image")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).symlink_to("/dev/full")
    arguments = (f"--data={images}", f"--output={tmp_path}", "--name=run", "--resume=auto")
    assert train(*arguments, "--epochs=2", "--max-corrupt=1", f"--workers={workers}") == 2
    said = capsys.readouterr().err
    assert "No space left on device" in said and said.count("\n") == 1
    assert str(tmp_path / "run") in said or workers
