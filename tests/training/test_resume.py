"""A killed and resumed run ends bit for bit like an uninterrupted one."""

import json
import os
import random
import shutil
import signal
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from training_runs import (
    final_state,
    fork_loaders_from_a_server,
    ignore_signals,
    kill,
    kill_at_call,
    make_images,
    same,
    start,
    train,
)

from backbones.training.run_state import load_state, save_state

# Everything random is on: dropout, drop path, erasing, mixing, an averaged model.
RECIPE = [
    *("--epochs=2", "--save-every-steps=1", "--log-every=2", "--clip-grad=1.0", "--drop=0.1"),
    *("--mixup=0.2", "--cutmix=1.0", "--reprob=0.3", "--drop-path=0.1", "--aa=rand-m5-inc1"),
    *("--ema", "--ema-decay=0.9"),
]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("images"), {"train": 52, "val": 13})


@pytest.fixture(scope="module")
def undisturbed(images, tmp_path_factory):
    output = tmp_path_factory.mktemp("undisturbed")
    assert train(f"--data={images}", f"--output={output}", "--name=run", *RECIPE) == 0
    return final_state(output / "run"), (output / "run" / "metrics.jsonl").read_text()


def finish(output, images):
    process = start(
        f"--data={images}", f"--output={output}", "--name=run", "--resume=auto", *RECIPE
    )
    process.join()
    assert process.exitcode == 0
    return final_state(output / "run")


def test_killed_at_random_moments(images, undisturbed, tmp_path):
    arguments = (f"--data={images}", f"--output={tmp_path}", "--name=run", "--resume=auto", *RECIPE)
    last, delays, kills = tmp_path / "run" / "last.pt", random.Random(0), 0
    while True:
        before = last.stat().st_mtime_ns if last.exists() else 0
        # However fast the machine, a process gets through two of the 14 saves, all of which but the
        # first link the file before.
        pause = partial(kill_at_call, "link", 2 if before else 1, signal.SIGSTOP)
        process = start(*arguments, before=pause)
        while process.is_alive() and (not last.exists() or last.stat().st_mtime_ns == before):
            time.sleep(0.005)
        process.join(delays.uniform(0, 0.1))
        if process.exitcode is not None:
            break
        kill(process)
        kills += 1
    assert process.exitcode == 0
    assert kills >= 6
    assert same(final_state(tmp_path / "run"), undisturbed[0])


# A save calls fsync (twice for the file, once for the folder), link, and replace (the previous
# file, then the last one). The first of a row runs always, the others in the slow suite.
CALLS = {"fsync": (5, 9, 20), "link": (7, 0, 3), "replace": (5, 2, 10, 15)}
KILLS = [
    pytest.param(name, number, marks=[pytest.mark.slow] if number != numbers[0] else [])
    for name, numbers in CALLS.items()
    for number in numbers
]


@pytest.mark.parametrize(("name", "number"), KILLS)
def test_killed_while_saving(name, number, images, undisturbed, tmp_path):
    arguments = (f"--data={images}", f"--output={tmp_path}", "--name=run", *RECIPE)
    process = start(*arguments, before=partial(kill_at_call, name, number))
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert same(finish(tmp_path, images), undisturbed[0])


@pytest.mark.parametrize(
    "name", ["SIGTERM"] + [pytest.param(n, marks=pytest.mark.slow) for n in ("SIGINT", "SIGUSR1")]
)
def test_signals_save_and_exit(name, images, undisturbed, tmp_path):
    arguments = (f"--data={images}", f"--output={tmp_path}", "--name=run", *RECIPE)
    process = start(*arguments)
    process.wait_for(tmp_path / "run" / "last.pt")
    os.kill(process.pid, getattr(signal, name))
    process.join()
    assert process.exitcode == 128 + getattr(signal, name)
    assert same(finish(tmp_path, images), undisturbed[0])
    entries = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert len(entries) == len(undisturbed[1].splitlines())


def test_inherited_ignores_are_kept(images, undisturbed, tmp_path):
    """As under ``nohup``: the run goes on, and ends as it would have."""
    arguments = (f"--data={images}", f"--output={tmp_path}", "--name=run", *RECIPE)
    process = start(*arguments, before=ignore_signals)
    process.wait_for(tmp_path / "run" / "last.pt")
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGINT):
        os.kill(process.pid, number)
    process.join()
    assert process.exitcode == 0
    assert same(final_state(tmp_path / "run"), undisturbed[0])


def test_a_signal_to_the_process_group_spares_the_loaders(images, undisturbed, tmp_path):
    arguments = (f"--data={images}", f"--output={tmp_path}", "--name=run", *RECIPE)
    process = start(*arguments, "--workers=2", before=os.setsid)
    process.wait_for(tmp_path / "run" / "last.pt")
    os.killpg(process.pid, signal.SIGTERM)
    process.join()
    assert process.exitcode == 128 + signal.SIGTERM
    assert same(finish(tmp_path, images), undisturbed[0])


def descendants(pid):
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    children = [int(child) for task in tasks for child in task.read_text().split()]
    return children + [pid for child in children for pid in descendants(child)]


@pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
@pytest.mark.parametrize(
    "before", [None, pytest.param(fork_loaders_from_a_server, marks=pytest.mark.slow)]
)
def test_no_loader_outlives_a_killed_run(before, images, tmp_path):
    """The loaders' parent may be a fork server, which ends after its last child only."""
    arguments = (f"--data={images}", f"--output={tmp_path}", "--name=run", *RECIPE)
    process = start(*arguments, "--workers=2", before=before)
    process.wait_for(tmp_path / "run" / "last.pt")
    loaders = descendants(process.pid)
    process.kill()
    process.join()
    assert len(loaders) >= 2
    give_up = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in loaders):
        assert time.monotonic() < give_up, "loaders still run"
        time.sleep(0.01)


def without_clocks(text):
    clocks = {"images_per_second", "data_wait", "memory_mb", "seconds"}
    entries = [json.loads(line) for line in text.splitlines()]
    return [{k: v for k, v in entry.items() if k not in clocks} for entry in entries]


def test_an_epoch_that_was_saved_and_not_recorded(images, undisturbed, tmp_path):
    """Killed right after the save at the end of an epoch, before its row was written."""
    arguments = (f"--data={images}", f"--output={tmp_path}", "--name=run", *RECIPE)
    # A folder is closed after each file: config.yaml, six updates, the best weights, the epoch.
    process = start(*arguments, before=partial(kill_at_call, "close", 8))
    process.join()
    assert process.exitcode == -signal.SIGKILL
    metrics, summary = (tmp_path / "run" / name for name in ("metrics.jsonl", "summary.csv"))
    assert load_state(tmp_path / "run" / "last.pt")["epoch"] == 1
    assert "train_loss" not in metrics.read_text() and not summary.exists()
    assert same(finish(tmp_path, images), undisturbed[0])
    assert without_clocks(metrics.read_text()) == without_clocks(undisturbed[1])
    epochs = [line.split(",")[0] for line in summary.read_text().splitlines()]
    assert epochs == ["epoch", "0", "1"]


def test_a_corrupt_checkpoint_falls_back(images, undisturbed, tmp_path, capsys):
    arguments = (f"--data={images}", f"--output={tmp_path}", "--name=run", *RECIPE)
    process = start(*arguments, before=partial(kill_at_call, "replace", 12))
    process.join()
    last = tmp_path / "run" / "last.pt"
    last.write_bytes(last.read_bytes()[:5000])
    assert train(*arguments, "--resume=auto") == 0
    assert "falling back to" in capsys.readouterr().out
    assert same(final_state(tmp_path / "run"), undisturbed[0])


@pytest.mark.slow
def test_loader_processes_change_nothing(images, undisturbed, tmp_path):
    arguments = (f"--data={images}", f"--output={tmp_path}", "--name=run", *RECIPE)
    process = start(*arguments, "--workers=2")
    process.join()
    assert process.exitcode == 0
    assert same(final_state(tmp_path / "run"), undisturbed[0])


def test_another_model_is_refused(images, tmp_path, capsys):
    arguments = (f"--data={images}", f"--output={tmp_path}", "--name=run")
    assert train(*arguments, "--epochs=1") == 0
    assert train(*arguments, "--epochs=2", "--resume=auto", "--model-args={}") == 2
    message = capsys.readouterr().err
    assert "last.pt does not fit this recipe: model_args: {'attn_dims': " in message
    assert message.count("\n") == 1
    config = (tmp_path / "run" / "config.yaml").read_text()
    assert "model_args: {attn_dims:" in config  # still that of the run
    assert train(*arguments, "--epochs=2") == 2
    assert "contains an earlier run" in capsys.readouterr().err


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
    ],
)
@pytest.mark.filterwarnings("ignore:PlateauLRScheduler is deprecated")
def test_checkpoints_that_cannot_be_resumed(words, message, one_epoch, images, tmp_path, capsys):
    shutil.copytree(one_epoch, tmp_path / "run")
    arguments = (f"--data={images}", f"--output={tmp_path}", "--name=run", "--epochs=2")
    assert train(*arguments, "--resume=auto", *words) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
    assert same(final_state(tmp_path / "run"), final_state(one_epoch))


@pytest.fixture(scope="module")
def one_epoch(images, tmp_path_factory):
    output = tmp_path_factory.mktemp("one_epoch")
    assert train(f"--data={images}", f"--output={output}", "--name=run", "--epochs=1") == 0
    return output / "run"


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
def test_other_changes_apply(words, setting, value, one_epoch, images, tmp_path):
    shutil.copytree(one_epoch, tmp_path / "run")
    arguments = (f"--data={images}", f"--output={tmp_path}", "--name=run", "--epochs=2")
    assert train(*arguments, "--resume=auto", *words) == 0
    groups = load_state(tmp_path / "run" / "last.pt")["optimizer"]["param_groups"]
    assert any(group[setting] == value for group in groups) or value is None


def test_a_longer_schedule_applies(one_epoch, images, tmp_path):
    """With ``epochs`` changed the rate follows the new schedule, not the end of the old one."""
    shutil.copytree(one_epoch, tmp_path / "run")
    arguments = (f"--data={images}", f"--output={tmp_path}", "--epochs=4", "--warmup-epochs=0")
    assert train(*arguments, "--name=run", "--resume=auto") == 0
    assert train(*arguments, "--name=whole") == 0
    rates = []
    for name in ("run", "whole"):
        text = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        entries = [json.loads(line) for line in text]
        rates.append([e["lr"] for e in entries if "train_loss" in e and e["epoch"] > 0])
    assert rates[0] == rates[1] and len(rates[0]) == 3


@pytest.mark.parametrize(("size", "done", "all_of_them"), [(4, 8, 13), (12, 2, 4)])
def test_another_batch_size_goes_on_at_the_same_image(
    size, done, all_of_them, images, tmp_path, capsys
):
    """After 4 of 6 batches of 8."""
    run = (f"--data={images}", f"--output={tmp_path}", "--name=run", "--epochs=1")
    assert train(*run, "--save-every-steps=4") == 0
    folder = tmp_path / "run"
    shutil.copy(folder / "last.prev.pt", folder / "last.pt")
    assert train(*run, f"--batch-size={size}", "--resume=auto") == 0
    assert f"last.pt: epoch 1, update {done}\n" in capsys.readouterr().out
    assert load_state(folder / "last.pt")["updates"] == all_of_them


@pytest.mark.parametrize("missing", ["optimizer", "ranks", "recipe", "history"])
def test_incomplete_state(missing, one_epoch, images, tmp_path, capsys):
    state = load_state(one_epoch / "last.pt")
    del state[missing]
    save_state(tmp_path / "last.pt", state)
    arguments = (f"--data={images}", f"--output={tmp_path}", "--name=run", "--epochs=2")
    assert train(*arguments, f"--resume={tmp_path / 'last.pt'}") == 2
    assert f"has no training state (no '{missing}' in it)" in capsys.readouterr().err


@pytest.mark.parametrize("key", ["ranks", "recipe", "optimizer", "model"])
@pytest.mark.parametrize("value", [3, {}], ids=str)
def test_invalid_state(key, value, one_epoch, images, tmp_path, capsys):
    save_state(tmp_path / "last.pt", {**load_state(one_epoch / "last.pt"), key: value})
    arguments = (f"--data={images}", f"--output={tmp_path}", "--name=run", "--epochs=2")
    assert train(*arguments, f"--resume={tmp_path / 'last.pt'}") == 2
    said = capsys.readouterr().err
    assert "does not fit this recipe" in said or "has no training state" in said
    assert said.count("\n") == 1
