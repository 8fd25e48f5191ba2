"""The folder of a run: nothing is overwritten, and it is locked."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import socket
from argparse import Namespace

import pytest
from training_runs import kill, make_images, start, start_two, train

from backbones.common.errors import RecipeError
from backbones.common.keys import dump
from backbones.common.lock import LOCK_NAME, FolderLock, LockedError
from backbones.training.folder import RunFolder
from backbones.training.recipe import Recipe


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("images"), {"train": 9, "val": 3})


@pytest.fixture
def arguments(images, tmp_path):
    return (f"--data={images}", f"--output={tmp_path}", "--name=run", "--epochs=1")


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


# --- overwriting


def test_overwriting_removes_only_what_a_run_left(arguments, tmp_path):
    assert train(*arguments) == 0
    folder = tmp_path / "run"
    old = {"last.prev.pt", "diverged.pt", "curves.png", "events.out.tfevents.1", "bad_batches.txt"}
    theirs = {"notes.txt", "weights.pt", "slurm.log"}
    for name in old | theirs:
        (folder / name).write_text("old")
    (folder / "figures").mkdir()
    assert train(*arguments, "--overwrite") == 0
    names = {path.name for path in folder.iterdir()}
    assert theirs | {"figures", "last.pt", "config.yaml"} <= names
    assert not names & old


@pytest.mark.parametrize(
    "words",
    [
        ("--data=nowhere",),
        ("--sched=wsd", "--decay-epochs=99"),
        ("--resume=nowhere.pt",),
        ("--tensorboard",),
        ("--cutmix-minmax", "0.5", "0.51"),
    ],
    ids=str,
)
def test_errors_are_found_before_anything_is_removed(words, arguments, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(dump(Recipe()))
    (folder / "last.pt").write_text("weights")
    before = content(folder)
    assert train(*arguments, "--overwrite", *words) == 2
    assert content(folder) == before


@pytest.mark.parametrize("name", ["last.pt", "summary.csv", "config.yaml"])
def test_a_folder_of_something_else_is_not_touched(name, arguments, tmp_path, capsys):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / name).write_text("of another program")
    before = content(folder)
    assert train(*arguments, "--overwrite", "true") == 2
    message = capsys.readouterr().err
    assert "contains another program's files" in message and message.count("\n") == 1
    assert content(folder) == before


def test_other_files_are_no_obstacle(arguments, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "slurm.log").write_text("begun")
    assert train(*arguments, "--overwrite") == 0
    assert (tmp_path / "run" / "slurm.log").read_text() == "begun"


def test_the_resumed_checkpoint_may_lie_in_the_folder(arguments, tmp_path):
    assert train(*arguments) == 0
    last = f"--resume={tmp_path / 'run' / 'last.pt'}"
    assert train(*arguments, "--overwrite", last, "--epochs=2") == 0
    assert (tmp_path / "run" / "summary.csv").read_text().splitlines()[-1].startswith("1,")


@pytest.mark.parametrize("option", ["--checkpoint", "--class-map", "--teacher-checkpoint"])
def test_what_a_run_reads_is_not_overwritten(option, arguments, tmp_path, capsys):
    assert train(*arguments) == 0
    before = content(tmp_path / "run")
    (tmp_path / "link").symlink_to("run/best.safetensors")
    for file in (tmp_path / "run" / "best.safetensors", tmp_path / "link"):
        for more in ("--overwrite", "--resume=auto"):
            assert train(*arguments, f"{option}={file}", more) == 2
            message = capsys.readouterr().err
            assert f"the run would overwrite {file}, which it reads" in message
            assert message.count("\n") == 1
    assert content(tmp_path / "run") == before


def test_errors_leave_no_folder(arguments, tmp_path):
    assert train(*arguments, "--data=nowhere") == 2
    assert not (tmp_path / "run").exists()


def test_unusable_folders(images, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for output, name in ((tmp_path / "file", "run"), (tmp_path, "file"), (tmp_path, "x" * 300)):
        assert train(f"--data={images}", f"--output={output}", f"--name={name}") == 2
        message = capsys.readouterr().err
        assert message.startswith("error: cannot use the folder") and message.count("\n") == 1


# --- the lock


def test_a_second_run_is_told_who_locked_the_folder(arguments, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    lock = FolderLock(tmp_path / "run")
    assert train(*arguments, "--resume=auto") == 2
    message = capsys.readouterr().err
    holder = f"is in use by process {os.getpid()} on {socket.gethostname()} since 20"
    assert holder in message and message.count("\n") == 1
    lock.release()
    assert not (tmp_path / "run" / LOCK_NAME).exists()
    assert train(*arguments, "--resume=auto") == 0
    assert not (tmp_path / "run" / LOCK_NAME).exists()


def test_a_run_without_a_name_takes_another_folder(images, tmp_path):
    (tmp_path / "shvit_s1").mkdir()
    lock = FolderLock(tmp_path / "shvit_s1")
    assert train(f"--data={images}", f"--output={tmp_path}", "--epochs=1") == 0
    lock.release()
    assert (tmp_path / "shvit_s1-2" / "last.pt").exists()


def test_a_killed_run_releases_its_folder(arguments, tmp_path):
    many = (*arguments, "--epochs=1000", "--save-every-steps=1", "--workers=1", "--resume=auto")
    process = start(*many)
    process.wait_for(tmp_path / "run" / "last.pt")
    with pytest.raises(LockedError, match=f"process {process.pid} on "):
        FolderLock(tmp_path / "run")
    kill(process)  # the loader process lives on for a while
    # And leaves its lock file, which is no lock.
    assert (tmp_path / "run" / LOCK_NAME).exists()
    FolderLock(tmp_path / "run").release()


def test_a_child_process_does_not_hold_the_lock(tmp_path):
    lock = FolderLock(tmp_path)
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(writing)
        os.read(reading, 1)
        os._exit(0)
    lock.release()
    FolderLock(tmp_path).release()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(reading)
    os.close(writing)


@pytest.mark.parametrize("text", ["", '{"pid": "x"}', '{"pid": 1, "since": 1e300}'])
def test_an_unknown_lock_holder(text, tmp_path):
    lock = FolderLock(tmp_path)
    (tmp_path / LOCK_NAME).write_text(text)
    with pytest.raises(LockedError, match="another process"):
        FolderLock(tmp_path)
    lock.release()


def test_a_full_disk_leaves_a_lock_without_a_name(tmp_path, monkeypatch):
    def write(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", write)
        lock = FolderLock(tmp_path)
    with pytest.raises(LockedError, match="another process"):
        FolderLock(tmp_path)
    lock.release()
    assert not list(tmp_path.iterdir())


def test_a_file_system_without_locks(arguments, tmp_path, monkeypatch, capsys):
    def flock(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    assert train(*arguments) == 0
    assert "run is not locked: its file system does not lock" in capsys.readouterr().out


def test_two_processes_of_one_run_share_its_lock(arguments, tmp_path):
    processes = start_two(*arguments, "--batch-size=4")
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]


def test_resuming_takes_the_last_of_the_runs(tmp_path):
    for name in ("van_b0", "van_b0-2", "van_b0-4"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "last.pt").touch()
    recipe, options = Recipe(model="van_b0", output=str(tmp_path)), Namespace(config=None)
    recipe.resume = "auto"
    folder = RunFolder(recipe, options)
    assert folder.path.name == "van_b0-2"
    folder.leave()
    recipe.resume = None
    folder = RunFolder(recipe, options)
    assert folder.path.name == "van_b0-3"
    folder.leave()
    assert not folder.path.exists()
    recipe.name = "van_b0"
    with pytest.raises(RecipeError, match="contains an earlier run"):
        RunFolder(recipe, options)
