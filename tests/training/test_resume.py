"""A killed and resumed run ends bit for bit like an uninterrupted one."""

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
from training_runs import (
    Runs,
    fork_loaders_from_a_server,
    ignore_signals,
    join,
    kill,
    make_images,
    same,
)

from backbones.training.resumable import load_state

# Everything random is on: dropout, drop path, erasing, mixing, an averaged model.
RECIPE = [
    *("--epochs=2", "--save-every-steps=1", "--log-every=2", "--clip-grad=1.0", "--drop=0.1"),
    *("--mixup=0.2", "--cutmix=1.0", "--reprob=0.3", "--drop-path=0.1", "--aa=rand-m5-inc1"),
    *("--ema", "--ema-decay=0.9"),
]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("images"), {"train": 52, "val": 13})


def trained(images, factory, *words):
    """A run, of which nothing is printed."""
    run = Runs(factory.mktemp("run"), None, f"--data={images}")
    assert join([run.start(*words)]) == [0]
    return run


@pytest.fixture(scope="module")
def undisturbed(images, tmp_path_factory):
    run = trained(images, tmp_path_factory, *RECIPE)
    return run.state(), (run.folder / "metrics.jsonl").read_text()


@pytest.fixture(scope="module")
def one_epoch(images, tmp_path_factory):
    return trained(images, tmp_path_factory, "--epochs=1").folder


def finish(runs):
    assert join([runs.start("--resume=auto", *RECIPE)]) == [0]
    return runs.state()


# A save calls fsync (twice for the file, once for the folder), link, and replace (the previous
# file, then the last one). The first of a row runs always, the others in the slow suite.
CALLS = {"fsync": (5, 9, 20), "link": (7, 0, 3), "replace": (5, 2, 10, 15)}
KILLS = [
    pytest.param(name, number, marks=[pytest.mark.slow] if number != numbers[0] else [])
    for name, numbers in CALLS.items()
    for number in numbers
]


@pytest.mark.parametrize(("name", "number"), KILLS)
def test_killed_while_saving(name, number, undisturbed, runs):
    runs.kill_at(name, number, *RECIPE)
    assert same(finish(runs), undisturbed[0])


def test_killed_again_and_again(undisturbed, runs):
    """After every second or third of the 14 saves, in the middle of the next one."""
    for number in (2, 3, 2, 3):
        runs.kill_at("link", number, "--resume=auto", *RECIPE)
    assert same(finish(runs), undisturbed[0])


@pytest.mark.parametrize(
    ("name", "send"),
    [
        ("SIGTERM", os.kill),
        ("SIGTERM", os.killpg),  # spares the loaders
        *(pytest.param(n, os.kill, marks=pytest.mark.slow) for n in ("SIGINT", "SIGUSR1")),
    ],
)
def test_signals_save_and_exit(name, send, undisturbed, runs):
    group = ("--workers=2",) if send is os.killpg else ()
    process = runs.start(*RECIPE, *group, before=os.setsid if group else None)
    process.wait_for(runs.folder / "last.pt")
    send(process.pid, getattr(signal, name))
    assert join([process]) == [128 + getattr(signal, name)]
    assert same(finish(runs), undisturbed[0])
    entries = (runs.folder / "metrics.jsonl").read_text().splitlines()
    assert len(entries) == len(undisturbed[1].splitlines())


def test_inherited_ignores_are_kept(undisturbed, runs):
    """As under ``nohup``: the run goes on, and ends as it would have."""
    process = runs.start(*RECIPE, before=ignore_signals)
    process.wait_for(runs.folder / "last.pt")
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGINT):
        os.kill(process.pid, number)
    assert join([process]) == [0]
    assert same(runs.state(), undisturbed[0])


def descendants(pid):
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    children = [int(child) for task in tasks for child in task.read_text().split()]
    return children + [pid for child in children for pid in descendants(child)]


@pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
@pytest.mark.parametrize(
    "before", [None, pytest.param(fork_loaders_from_a_server, marks=pytest.mark.slow)]
)
def test_no_loader_outlives_a_killed_run(before, runs):
    """The loaders' parent may be a fork server, which ends after its last child only."""
    process = runs.start(*RECIPE, "--workers=2", before=before)
    process.wait_for(runs.folder / "last.pt")
    loaders = descendants(process.pid)
    kill(process)
    assert len(loaders) >= 2
    give_up = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in loaders):
        assert time.monotonic() < give_up, "loaders still run"
        time.sleep(0.01)


def without_clocks(text):
    clocks = {"images_per_second", "data_wait", "memory_mb", "seconds"}
    entries = [json.loads(line) for line in text.splitlines()]
    return [{k: v for k, v in entry.items() if k not in clocks} for entry in entries]


def test_an_epoch_that_was_saved_and_not_recorded(undisturbed, runs):
    """Killed right after the save at the end of an epoch, before its row was written."""
    # A folder is closed after each file: config.yaml, six updates, the best weights, the epoch.
    runs.kill_at("close", 8, *RECIPE)
    metrics, summary = (runs.folder / name for name in ("metrics.jsonl", "summary.csv"))
    assert load_state(runs.folder / "last.pt")["epoch"] == 1
    assert "train_loss" not in metrics.read_text() and not summary.exists()
    assert same(finish(runs), undisturbed[0])
    assert without_clocks(metrics.read_text()) == without_clocks(undisturbed[1])
    epochs = [line.split(",")[0] for line in summary.read_text().splitlines()]
    assert epochs == ["epoch", "0", "1"]


def test_a_corrupt_checkpoint_falls_back(undisturbed, runs):
    runs.kill_at("replace", 12, *RECIPE)
    last, previous = (runs.folder / name for name in ("last.pt", "last.prev.pt"))
    good = previous.read_bytes()
    for path in (last, previous):
        path.write_bytes(path.read_bytes()[:5000])
    said = runs.refuse(*RECIPE, "--resume=auto")
    assert said.index(f"{last} is truncated") < said.index(f"{previous} is truncated")
    previous.write_bytes(good)
    assert f"falling back to {previous}" in runs.train(*RECIPE, "--resume=auto")
    assert same(runs.state(), undisturbed[0])


@pytest.mark.slow
def test_loader_processes_change_nothing(undisturbed, runs):
    assert join([runs.start(*RECIPE, "--workers=2")]) == [0]
    assert same(runs.state(), undisturbed[0])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--opt=sgd",), "opt: 'adamw' → 'sgd'"),
        (("--opt=adam",), "opt: 'adamw' → 'adam'"),
        (("--ema",), "ema: False → True"),
        (("--layer-decay=0.5",), "layer_decay: None → 0.5"),
        (("--weight-decay=0",), "weight_decay: 0.05 → 0.0"),
        (("--lr-factors={stem: 0.1}",), "lr_factors: {} → {'stem': 0.1}"),
        (("--sched=plateau",), "sched: 'cosine' → 'plateau'"),
        (("--in-chans=1",), "in_chans: 3 → 1"),
        (("--model-args={}",), "last.pt does not fit this recipe: model_args: {'attn_dims': "),
    ],
)
@pytest.mark.filterwarnings("ignore:PlateauLRScheduler is deprecated")
def test_checkpoints_that_cannot_be_resumed(words, message, one_epoch, runs):
    shutil.copytree(one_epoch, runs.folder)
    assert message in runs.refuse("--epochs=2", "--resume=auto", *words)
    for name in ("last.pt", "config.yaml"):
        assert (runs.folder / name).read_bytes() == (one_epoch / name).read_bytes()
    assert "contains an earlier run" in runs.refuse("--epochs=2")


@pytest.mark.parametrize(
    ("words", "setting", "value"),
    [
        (("--sched=none", "--lr=0.02"), "lr", 0.02),
        (("--sched=constant", "--lr=0.02"), "lr", 0.02),
        (("--weight-decay=0.3",), "weight_decay", 0.3),
        (("--opt-betas", "0.8", "0.9"), "betas", (0.8, 0.9)),
        (("--opt-eps=1e-4",), "eps", 1e-4),
        (("--opt-args={amsgrad: false, maximize: true}",), "maximize", True),
        (("--amp=fp16", "--clip-grad=1"), "lr", None),
    ],
)
def test_other_changes_apply(words, setting, value, one_epoch, runs):
    shutil.copytree(one_epoch, runs.folder)
    runs.train("--epochs=2", "--resume=auto", *words)
    groups = load_state(runs.folder / "last.pt")["optimizer"]["param_groups"]
    assert any(group[setting] == value for group in groups) or value is None


def test_a_longer_schedule_applies(one_epoch, runs):
    """With ``epochs`` changed the rate follows the new schedule, not the end of the old one."""
    shutil.copytree(one_epoch, runs.folder)
    rates = []
    for name in ("run", "whole"):
        runs.train("--epochs=4", "--warmup-epochs=0", f"--name={name}", "--resume=auto")
        text = (runs.output / name / "metrics.jsonl").read_text().splitlines()
        entries = [json.loads(line) for line in text]
        rates.append([e["lr"] for e in entries if "train_loss" in e and e["epoch"] > 0])
    assert rates[0] == rates[1] and len(rates[0]) == 3


@pytest.mark.parametrize(("size", "done", "all_of_them"), [(4, 8, 13), (12, 2, 4)])
def test_another_batch_size_goes_on_at_the_same_image(size, done, all_of_them, runs):
    """After 4 of 6 batches of 8."""
    runs.train("--epochs=1", "--save-every-steps=4")
    shutil.copy(runs.folder / "last.prev.pt", runs.folder / "last.pt")
    said = runs.train("--epochs=1", f"--batch-size={size}", "--resume=auto")
    assert f"last.pt: epoch 1, update {done}\n" in said
    assert load_state(runs.folder / "last.pt")["updates"] == all_of_them
