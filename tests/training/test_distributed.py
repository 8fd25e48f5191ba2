"""Two gloo processes train like one: gradients, validation, resuming."""

import os
import signal
from functools import partial

import pytest
import torch
from training_runs import (
    free_port,
    freeze_batch_norm,
    join,
    kill,
    kill_at_call,
    make_images,
    same,
    start,
    start_leaving,
)

from backbones.common.lock import FolderLock

SGD = ["--opt=momentum", "--momentum=0", "--lr=0.1", "--weight-decay=0"]
SGD += ["--sched=none", "--epochs=2"]
RANDOM = ["--epochs=2", "--mixup=0.2", "--reprob=0.3", "--drop=0.1", "--ema", "--ema-decay=0.9"]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("images"), {"train": 50, "val": 11})


def test_all_processes_learn_that_the_folder_is_locked(runs):
    runs.folder.mkdir()
    lock = FolderLock(runs.folder)
    assert join(runs.start_two()) == [2, 2]
    lock.release()


@pytest.mark.parametrize("size", ["many", "0", "-2"])
def test_a_world_without_a_size(size, runs):
    assert join([start(*runs.words(), env={"WORLD_SIZE": size})]) == [2]


def test_two_processes_and_accumulation_equal_one_big_batch(runs):
    """Also if one of them then goes on alone, from within an epoch."""
    big, two = (*SGD, "--batch-size=16"), ("--batch-size=4", "--accum-steps=2", "--name=two")
    started = {
        "whole": [runs.start(*big, "--name=whole", before=freeze_batch_norm)],
        "parts": [runs.start(*SGD, "--name=parts", "--accum-steps=2", before=freeze_batch_norm)],
        "two": runs.start_two(*SGD, *two, "--save-every-steps=5", before=(freeze_batch_norm,) * 2),
    }
    for processes in started.values():
        assert set(join(processes)) == {0}
    last = runs.output / "two" / "last.pt"
    last.with_name("last.prev.pt").replace(last)
    assert join([runs.start(*big, "--name=two", "--resume=auto", before=freeze_batch_norm)]) == [0]
    whole, *others = (runs.state(name) for name in started)
    for state in others:
        assert state["updates"] == 6
        for key, value in state["model"].items():
            torch.testing.assert_close(value, whole["model"][key], rtol=1e-4, atol=1e-5)
        for row, wanted in zip(state["history"], whole["history"], strict=True):
            for key in ("train_loss", "train_top1", "val_loss", "val_top1", "val_top5"):
                assert row[key] == pytest.approx(wanted[key], rel=1e-4)


def test_batch_norm_over_processes_without_a_gpu(runs):
    assert join(runs.start_two("--sync-bn")) == [2, 2]


def test_two_processes_resume_bit_for_bit(runs):
    words = ("--save-every-steps=1", *RANDOM)
    assert join(runs.start_two(*words, "--name=undisturbed")) == [0, 0]
    processes = runs.start_two(*words, before=(partial(kill_at_call, "link", 2), None))
    processes[0].join()
    kill(processes[1])
    assert processes[0].exitcode == -signal.SIGKILL
    assert join(runs.start_two(*words, "--resume=auto")) == [0, 0]
    states = [runs.state(name) for name in ("undisturbed", "run")]
    assert len(states[0]["ranks"]) == 2
    assert same(*states)


def test_leaving_does_not_deadlock_with_the_gil():
    """Gloo's threads let go of tensors under Python's lock, which DDP keeps at its end."""
    process = start_leaving(free_port())
    process.join(60)
    stuck = process.is_alive()
    kill(process)
    assert not stuck


def test_a_signal_to_one_stops_both_and_one_can_resume_alone(runs):
    words = ("--save-every-steps=1", *RANDOM)
    processes = runs.start_two(*words)
    processes[0].wait_for(runs.folder / "last.pt")
    os.kill(processes[1].pid, signal.SIGTERM)
    assert join(processes) == [128 + signal.SIGTERM] * 2
    assert join([runs.start(*words, "--resume=auto", "--batch-size=16")]) == [0]
    assert runs.state()["updates"] == 6


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(
            ["--opt=adamw", "--lr=1e-3", "--weight-decay=0.05", "--clip-grad=0.5"], id="adamw"
        ),
        pytest.param(
            [*SGD, "--accum-steps=2", "--batch-size=4"],
            id="sgd in two steps",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_sharded_weights_equal_replicated_ones(words, runs):
    words = [*words, "--epochs=2", "--ema", "--ema-decay=0.9", "--save-every-steps=2"]
    size = "--batch-size=8" if "--batch-size=4" in words else "--batch-size=16"
    both = (freeze_batch_norm,) * 2
    alone = runs.start(*words, "--name=whole", size, before=freeze_batch_norm)
    assert join([alone, *runs.start_two(*words, "--fsdp", before=both)]) == [0, 0, 0]
    whole, shared = runs.state("whole"), runs.state()
    assert shared["updates"] == whole["updates"] == 6
    for part in ("model", "model_ema"):
        assert shared[part].keys() == whole[part].keys()
        for key, value in shared[part].items():
            torch.testing.assert_close(value, whole[part][key], rtol=1e-4, atol=1e-5)
    for key, values in whole["optimizer"]["state"].items():
        for name, value in values.items():
            torch.testing.assert_close(
                shared["optimizer"]["state"][key][name], value, rtol=1e-3, atol=1e-5
            )
    for row, wanted in zip(shared["history"], whole["history"], strict=True):
        for key in ("train_loss", "train_top1", "val_loss", "val_top1", "ema_top1"):
            assert row[key] == pytest.approx(wanted[key], rel=1e-3)
    # Both steps that saved within an epoch and what came after are the same again.
    (runs.folder / "last.prev.pt").replace(runs.folder / "last.pt")
    assert join(runs.start_two(*words, "--fsdp", "--resume=auto", before=both)) == [0, 0]
    assert same(runs.state(), shared)
    # The file is that of a whole network: a single process goes on from it.
    assert join([runs.start(*words, "--resume=auto", "--epochs=3", size)]) == [0]
    assert runs.state()["updates"] == 9
