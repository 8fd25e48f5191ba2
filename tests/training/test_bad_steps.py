"""Non-finite losses: skipped without effect, counted, and finally reported."""

import csv
import json

import pytest
import safetensors
import torch
from training_runs import make_images, same

import train_cls
from backbones.training.build import BatchAugmentation
from backbones.training.resumable import load_state, save_state


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("images"), {"train": 48, "val": 12})


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


@pytest.mark.parametrize("accum", [1, 2])
def test_a_bad_batch_changes_nothing(accum, poison, runs):
    poison({1, 4})
    runs.train("--epochs=2", f"--accum-steps={accum}", "--ema")
    state = runs.state()
    for part in ("model", "model_ema"):
        assert all(torch.isfinite(value).all() for value in state[part].values())
    rows = list(csv.DictReader((runs.folder / "summary.csv").read_text().splitlines()))
    assert [row["skipped"] for row in rows] == ["2", "2"]
    assert torch.isfinite(torch.tensor([float(row["train_loss"]) for row in rows])).all()


def test_too_many_in_a_row_stop_the_run(poison, runs):
    poison(range(3, 100))
    message = runs.refuse("--epochs=3", "--max-bad-steps=3", "--save-every-steps=1")
    assert "not finite in 3 updates in a row; their 24 images" in message
    assert "last.pt has weights from before. A lower lr" in message
    names = (runs.folder / "bad_batches.txt").read_text().splitlines()
    assert len(names) == 24 and all(name.endswith(".png") for name in names)
    # Saved were updates 1, 2 and 3; no loss has shown that the weights of the third are good.
    last, doubtful = (load_state(runs.folder / n) for n in ("last.pt", "diverged.pt"))
    assert (last["updates"], doubtful["updates"]) == (2, 3)
    assert last["skipped"] == 0


def test_validated_weights_are_kept(poison, runs):
    poison(range(6, 100))
    assert "last.pt has weights from before" in runs.refuse("--epochs=3", "--max-bad-steps=3")
    assert load_state(runs.folder / "last.pt")["updates"] == 6
    assert not (runs.folder / "diverged.pt").exists()


def test_a_bad_last_step_does_not_matter_to_validated_weights(poison, runs):
    poison({5})
    runs.train("--epochs=1")
    last, validated = (load_state(runs.folder / f"last{n}.pt") for n in ("", ".validated"))
    assert last["updates"] == validated["updates"] == 6 and last["skipped"] == 1


@pytest.mark.parametrize("opt", ["sgd", pytest.param("adamw", marks=pytest.mark.slow)])
def test_a_diverged_run_resumes_with_a_lower_rate(opt, runs):
    """Norms keep the training loss finite for a while, whatever size the weights have."""
    folder, words = runs.folder, ("--save-every-steps=1", "--max-bad-steps=3", f"--opt={opt}")
    words += ("--ema", "--log-every=1", "--sched=none", "--resume=auto")
    runs.train(*words, "--epochs=1")
    good = load_state(folder / "last.pt")
    words += ("--epochs=2",)
    assert "last.pt has weights from before. A lower lr" in runs.refuse(*words, "--lr=1000")
    state = load_state(folder / "last.pt")
    assert state["updates"] == 6 and same(state["model"], good["model"])
    assert load_state(folder / "diverged.pt")["updates"] > 6
    assert best_epoch(folder) == "1"
    runs.train(*words, "--lr=1e-3")
    rates = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [e["lr"] for e in rates if e["update"] > 6] == [1e-3] * 7
    assert runs.state()["skipped"] == 0


def best_epoch(folder):
    """Of the best weights, which are finite."""
    with safetensors.safe_open(folder / "best.safetensors", "pt") as file:
        assert all(file.get_tensor(name).isfinite().all() for name in file.keys())  # noqa: SIM118
        return file.metadata()["epoch"]


def test_weights_of_any_size_are_not_saved(runs):
    """The updates of the first epoch: no validation has found any of them good yet."""
    runs.refuse("--save-every-steps=1", "--epochs=2", "--opt=sgd", "--sched=none", "--lr=100")
    for path in runs.folder.glob("*.pt"):
        weights = load_state(path)["model"].values()
        assert all((value.abs() <= 1e12).all() for value in weights)


def test_a_diverged_run_that_saved_nothing_says_so(runs):
    words = ("--epochs=2", "--opt=sgd", "--lr=1000", "--max-bad-steps=2", "--sched=none")
    assert "none were saved before" in runs.refuse(*words, "--warmup-epochs=0")
    assert not list(runs.folder.glob("*.pt")) + list(runs.folder.glob("*.safe*"))


@pytest.mark.parametrize(
    ("words", "update"),
    [((), 12), (("--ema",), 12), (("--save-every-steps=1",), 12), (("--eval-every=3",), 6)],
)
def test_non_finite_weights_end_the_run(words, update, runs, monkeypatch):
    """A weight is NaN after an update at an epoch's end, with a validation or, at last, without."""
    original = train_cls.Trainer.apply_gradients

    def apply_gradients(self):
        original(self)
        if self.updates + 1 == update:
            with torch.no_grad():
                next(self.model.parameters()).fill_(float("nan"))

    monkeypatch.setattr(train_cls.Trainer, "apply_gradients", apply_gradients)
    if update == 6:
        runs.refuse("--epochs=3", "--max-bad-steps=2", *words)
        assert not (runs.folder / "last.pt").exists()
        return
    said = runs.refuse("--epochs=2", *words)
    assert said.startswith("error: the validation after 12 updates found loss nan, weights that")
    assert load_state(runs.folder / "last.pt")["updates"] == 6
    assert best_epoch(runs.folder) == "1"


def test_a_diverged_checkpoint_is_rejected(runs):
    runs.train("--epochs=1")
    state = load_state(runs.folder / "last.pt")
    next(iter(state["model"].values())).fill_(float("inf"))
    save_state(runs.folder / "last.pt", state)
    assert "has weights that are not finite" in runs.refuse("--epochs=2", "--resume=auto")
