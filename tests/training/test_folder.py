"""The folder of a run: nothing is overwritten, and it is locked."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import sys
from argparse import Namespace

import pytest
import torch
from training_runs import kill, make_images

from backbones.common.errors import RecipeError
from backbones.common.keys import dump
from backbones.common.lock import LOCK_NAME, FolderLock, LockedError
from backbones.common.processes import World
from backbones.training.command_line import load_recipe
from backbones.training.folder import RunFolder
from backbones.training.recipe import Recipe


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("images"), {"train": 9, "val": 3})


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


# --- overwriting


def test_overwriting_removes_only_what_a_run_left(runs):
    theirs = {"notes.txt", "weights.pt", "slurm.log"}
    runs.folder.mkdir()
    for name in theirs:  # which are no obstacle to a first run
        (runs.folder / name).write_text("old")
    runs.train("--epochs=1", "--overwrite")
    old = {"last.prev.pt", "diverged.pt", "curves.png", "events.out.tfevents.1", "bad_batches.txt"}
    for name in old:
        (runs.folder / name).write_text("old")
    (runs.folder / "figures").mkdir()
    runs.train("--epochs=1", "--overwrite")
    names = {path.name for path in runs.folder.iterdir()}
    assert theirs | {"figures", "last.pt", "config.yaml"} <= names
    assert not load_recipe(runs.folder / "config.yaml").overwrite  # for who repeats the run
    assert not names & old
    assert all((runs.folder / name).read_text() == "old" for name in theirs)


@pytest.mark.parametrize(
    "words",
    [
        ("--data=nowhere",),
        ("--sched=wsd", "--decay-epochs=99"),
        ("--resume=nowhere.pt",),
        ("--tensorboard",),
    ],
    ids=str,
)
def test_errors_are_found_before_anything_is_removed(words, runs, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    runs.refuse("--epochs=1", *words)
    assert not runs.folder.exists()
    runs.folder.mkdir()
    (runs.folder / "config.yaml").write_text(dump(Recipe()))
    (runs.folder / "last.pt").write_text("weights")
    before = content(runs.folder)
    runs.refuse("--epochs=1", "--overwrite", *words)
    assert content(runs.folder) == before


@pytest.mark.parametrize("name", ["last.pt", "summary.csv", "config.yaml"])
def test_a_folder_of_something_else_is_not_touched(name, runs):
    runs.folder.mkdir()
    (runs.folder / name).write_text("of another program")
    before = content(runs.folder)
    said = runs.refuse("--epochs=1", "--overwrite", "true")
    assert "contains another program's files" in said
    assert content(runs.folder) == before


@pytest.mark.parametrize("checkpoint", ["last.pt", None])
def test_the_resumed_checkpoint_may_lie_in_the_folder(checkpoint, runs):
    """By its path, and as the latest one, of whose run ``--overwrite`` then removes nothing."""
    runs.train("--epochs=1")
    resume = "auto" if checkpoint is None else runs.folder / checkpoint
    assert "resuming from" in runs.train("--overwrite", f"--resume={resume}", "--epochs=2")
    assert (runs.folder / "summary.csv").read_text().splitlines()[-1].startswith("1,")
    epochs = (runs.folder / "metrics.jsonl").read_text().count("train_loss")
    assert checkpoint is not None or epochs == 2


def test_what_a_run_reads_is_not_overwritten(runs):
    runs.train("--epochs=1")
    before = content(runs.folder)
    (runs.output / "link").symlink_to("run/best.safetensors")
    for option in ("--checkpoint", "--class-map", "--teacher-checkpoint"):
        for file in (runs.folder / "best.safetensors", runs.output / "link"):
            for more in ("--overwrite", "--resume=auto"):
                said = runs.refuse("--epochs=1", f"{option}={file}", more)
                assert f"the run would overwrite {file}, which it reads" in said
    assert content(runs.folder) == before


def test_unusable_folders(runs):
    file = runs.output / "file"
    file.write_text("")
    for words in ((f"--output={file}",), ("--name=file",), (f"--name={'x' * 300}",)):
        assert runs.refuse(*words).startswith("error: cannot use the folder")


# --- the lock


def test_a_second_run_is_told_who_locked_the_folder(runs):
    runs.folder.mkdir()
    lock = FolderLock(runs.folder)
    said = runs.refuse("--epochs=1", "--resume=auto")
    assert f"is in use by process {os.getpid()} on {socket.gethostname()} since 20" in said
    lock.release()
    assert not (runs.folder / LOCK_NAME).exists()
    runs.train("--epochs=1", "--resume=auto")
    assert not (runs.folder / LOCK_NAME).exists()


def test_a_run_without_a_name_takes_another_folder(runs):
    (runs.output / "shvit_s1").mkdir()
    lock = FolderLock(runs.output / "shvit_s1")
    runs.train("--name=none", "--epochs=1")
    lock.release()
    assert (runs.output / "shvit_s1-2" / "last.pt").exists()


def test_a_killed_run_releases_its_folder(runs):
    process = runs.start("--epochs=1000", "--save-every-steps=1", "--workers=1", "--resume=auto")
    process.wait_for(runs.folder / "last.pt")
    with pytest.raises(LockedError, match=f"process {process.pid} on "):
        FolderLock(runs.folder)
    kill(process)  # the loader process lives on for a while
    # And leaves its lock file, which is no lock.
    assert (runs.folder / LOCK_NAME).exists()
    FolderLock(runs.folder).release()


@pytest.mark.parametrize("text", [None, "", '{"pid": "x"}', '{"pid": 1, "since": 1e300}'])
def test_an_unknown_lock_holder(text, tmp_path, monkeypatch):
    """Also if a full disk has kept its name out of the file."""

    def write(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        if text is None:
            patched.setattr(os, "write", write)
        lock = FolderLock(tmp_path)
    if text is not None:
        (tmp_path / LOCK_NAME).write_text(text)
    with pytest.raises(LockedError, match="another process"):
        FolderLock(tmp_path)
    lock.release()
    assert not list(tmp_path.iterdir())


def test_a_file_system_without_locks(runs, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    assert "run is not locked: its file system does not lock" in runs.train("--epochs=1")


def test_resuming_takes_the_last_of_the_runs(tmp_path):
    for name in ("van_b0", "van_b0-2", "van_b0-4"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "last.pt").touch()
    recipe, options = Recipe(model="van_b0", output=str(tmp_path)), Namespace(config=None)
    alone = World(0, 1, torch.device("cpu"))
    for resume, wanted in (("auto", "van_b0-2"), (None, "van_b0-3")):
        recipe.resume = resume
        folder = RunFolder(recipe, options, alone)
        assert folder.path.name == wanted
        folder.leave()
    assert not folder.path.exists()
    recipe.name = "van_b0"
    with pytest.raises(RecipeError, match="contains an earlier run"):
        RunFolder(recipe, options, alone)
