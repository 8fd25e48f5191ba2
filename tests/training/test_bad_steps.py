"""A loss that is not finite: skipped without a trace, counted, and in the end explained."""

import csv

import pytest
import torch
from training_runs import final_state, make_images, same, train

from backbones.training.build import BatchAugmentation
from backbones.training.checkpoint import load_state


@pytest.fixture
def poison(monkeypatch):
    """Let the images of certain batches be NaN."""
    original = BatchAugmentation.__call__

    def poison(batches):
        calls = iter(range(10**6))

        def call(self, images, labels, epoch):
            images, labels = original(self, images, labels, epoch)
            return (images * float("nan") if next(calls) in batches else images), labels

        monkeypatch.setattr(BatchAugmentation, "__call__", call)

    return poison


@pytest.fixture
def arguments(tmp_path):
    images = make_images(tmp_path / "images", {"train": 48, "val": 12})
    return (f"--data={images}", f"--output={tmp_path}", "--name=run")


@pytest.mark.parametrize("accum", [1, 2])
def test_a_bad_batch_leaves_no_trace(accum, poison, arguments, tmp_path):
    poison({1, 4})
    assert train(*arguments, "--epochs=2", f"--accum-steps={accum}", "--ema") == 0
    state = final_state(tmp_path / "run")
    for part in ("model", "model_ema"):
        assert all(torch.isfinite(value).all() for value in state[part].values())
    rows = list(csv.DictReader((tmp_path / "run" / "summary.csv").read_text().splitlines()))
    assert [row["skipped"] for row in rows] == ["2", "2"]
    assert torch.isfinite(torch.tensor([float(row["train_loss"]) for row in rows])).all()


def test_too_many_in_a_row_stop_the_run(poison, arguments, tmp_path, capsys):
    poison(range(3, 100))
    run = (*arguments, "--epochs=3", "--max-bad-steps=4", "--save-every-steps=3")
    assert train(*run) == 1
    message = capsys.readouterr().err
    assert "not finite in 4 updates in a row; their 32 images" in message
    names = (tmp_path / "run" / "bad_batches.txt").read_text().splitlines()
    assert len(names) == 32 and all(name.endswith(".png") for name in names)
    state = final_state(tmp_path / "run")
    assert (state["skipped"], state["updates"]) == (4, 7)
    before = load_state(tmp_path / "run" / "last.prev.pt")  # of update 6, three of them bad
    assert (before["updates"], before["skipped"]) == (6, 3)
    assert same(before["model"], state["model"])
    assert all(torch.isfinite(value).all() for value in state["model"].values())
