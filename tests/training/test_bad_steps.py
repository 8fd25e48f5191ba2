"""Non-finite losses: skipped without effect, counted, and finally reported."""

import csv
import json

import pytest
import safetensors
import torch
from training_runs import final_state, make_images, same, train

import train_cls
from backbones.training.build import BatchAugmentation
from backbones.training.run_state import load_state, save_state


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
def test_a_bad_batch_changes_nothing(accum, poison, arguments, tmp_path):
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
    run = (*arguments, "--epochs=3", "--max-bad-steps=3", "--save-every-steps=1")
    assert train(*run) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "not finite in 3 updates in a row; their 24 images" in message
    assert "last.pt has weights from before. A lower lr" in message
    names = (tmp_path / "run" / "bad_batches.txt").read_text().splitlines()
    assert len(names) == 24 and all(name.endswith(".png") for name in names)
    # Saved were updates 1, 2 and 3; no loss has shown that the weights of the third are good.
    last, doubtful = (load_state(tmp_path / "run" / n) for n in ("last.pt", "diverged.pt"))
    assert (last["updates"], doubtful["updates"]) == (2, 3)
    assert last["skipped"] == 0


def test_validated_weights_are_kept(poison, arguments, tmp_path, capsys):
    poison(range(6, 100))
    assert train(*arguments, "--epochs=3", "--max-bad-steps=3") == 2
    assert "last.pt has weights from before" in capsys.readouterr().err
    assert load_state(tmp_path / "run" / "last.pt")["updates"] == 6
    assert not (tmp_path / "run" / "diverged.pt").exists()


def test_a_bad_last_step_does_not_matter_to_validated_weights(poison, arguments, tmp_path):
    poison({5})
    assert train(*arguments, "--epochs=1") == 0
    last, validated = (load_state(tmp_path / "run" / f"last{n}.pt") for n in ("", ".validated"))
    assert last["updates"] == validated["updates"] == 6 and last["skipped"] == 1


@pytest.mark.parametrize("opt", ["sgd", pytest.param("adamw", marks=pytest.mark.slow)])
def test_a_diverged_run_resumes_with_a_lower_rate(opt, arguments, tmp_path, capsys):
    """Norms keep the training loss finite for a while, whatever size the weights have."""
    folder, run = tmp_path / "run", (*arguments, "--save-every-steps=1", "--max-bad-steps=3")
    run += (f"--opt={opt}", "--ema", "--log-every=1", "--sched=none", "--resume=auto")
    assert train(*run, "--epochs=1") == 0
    good = load_state(folder / "last.pt")
    run += ("--epochs=2",)
    assert train(*run, "--lr=1000") == 2
    message = capsys.readouterr().err
    assert "last.pt has weights from before. A lower lr" in message and message.count("\n") == 1
    state = load_state(folder / "last.pt")
    assert state["updates"] == 6 and same(state["model"], good["model"])
    assert load_state(folder / "diverged.pt")["updates"] > 6
    with safetensors.safe_open(folder / "best.safetensors", "pt") as file:
        assert file.metadata()["epoch"] == "1"
    assert train(*run, "--lr=1e-3") == 0
    rates = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [e["lr"] for e in rates if e["update"] > 6] == [1e-3] * 7
    assert final_state(folder)["skipped"] == 0


def test_weights_of_any_size_are_not_saved(arguments, tmp_path):
    """The updates of the first epoch: no validation has found any of them good yet."""
    run = (*arguments, "--save-every-steps=1", "--epochs=2", "--opt=sgd", "--sched=none")
    assert train(*run, "--lr=100") == 2
    for path in (tmp_path / "run").glob("*.pt"):
        weights = load_state(path)["model"].values()
        assert all((value.abs() <= 1e12).all() for value in weights)


def test_a_diverged_run_that_saved_nothing_says_so(arguments, tmp_path, capsys):
    run = (*arguments, "--epochs=2", "--opt=sgd", "--lr=1000", "--max-bad-steps=2")
    assert train(*run, "--sched=none", "--warmup-epochs=0") == 2
    assert "none were saved before" in capsys.readouterr().err
    assert not list((tmp_path / "run").glob("*.pt")) + list((tmp_path / "run").glob("*.safe*"))


@pytest.fixture
def spoil(monkeypatch):
    """Let a weight be NaN after a certain update, which the next loss would tell."""

    def spoil(loop, number):
        original = loop.apply_gradients

        def apply_gradients(self):
            original(self)
            if self.updates + 1 == number:
                with torch.no_grad():
                    next(self.model.parameters()).fill_(float("nan"))

        monkeypatch.setattr(loop, "apply_gradients", apply_gradients)

    return spoil


@pytest.mark.parametrize("words", [(), ("--ema",), ("--save-every-steps=1",)])
def test_non_finite_validation_ends_the_run(words, spoil, arguments, tmp_path, capsys):
    spoil(train_cls.Trainer, 12)
    assert train(*arguments, "--epochs=2", *words) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: the validation after 12 updates found loss nan, weights that")
    folder = tmp_path / "run"
    assert load_state(folder / "last.pt")["updates"] == 6
    with safetensors.safe_open(folder / "best.safetensors", "pt") as file:
        assert file.metadata()["epoch"] == "1"
        assert all(file.get_tensor(name).isfinite().all() for name in file.keys())  # noqa: SIM118


def test_non_finite_weights_are_not_saved(spoil, arguments, tmp_path):
    """With ``eval_every`` an epoch ends without a validation."""
    spoil(train_cls.Trainer, 6)
    assert train(*arguments, "--epochs=3", "--eval-every=3", "--max-bad-steps=2") == 2
    assert not (tmp_path / "run" / "last.pt").exists()


def test_a_diverged_checkpoint_is_rejected(arguments, tmp_path, capsys):
    assert train(*arguments, "--epochs=1") == 0
    state = load_state(tmp_path / "run" / "last.pt")
    next(iter(state["model"].values())).fill_(float("inf"))
    save_state(tmp_path / "run" / "last.pt", state)
    assert train(*arguments, "--epochs=2", "--resume=auto") == 2
    assert "has weights that are not finite" in capsys.readouterr().err
