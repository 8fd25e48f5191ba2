"""Where compiled libraries are kept, who else may change them, and what happens if others may."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import pwd
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ops import cpu
from ops.cpu.build import folders
from ops.cpu.build.folders import is_own_file, problem
from ops.cpu.build.sources import Sources


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "above" / "it's a folder"
    made.mkdir(parents=True, mode=0o755)
    made.parent.chmod(0o755)
    return made


def give_away(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``path`` is another user's afterwards; unless root runs the tests, all else is, too."""
    if os.geteuid() == 0:
        os.lchown(path, 12345, -1)
    else:
        monkeypatch.setattr(folders.os, "geteuid", lambda: 12345)


# ---- who may write -----------------------------------------------------------------------------
@pytest.mark.parametrize("mode", [0o777, 0o757, 0o775, 0o1777])
def test_a_writable_folder_and_parent(folder: Path, mode: int) -> None:
    assert problem(folder) is None and problem(folder / "not" / "there") is None
    for writable in (folder, folder.parent):
        writable.chmod(mode)
        found = problem(folder)
        # In a sticky parent nobody can move what is another's.
        if mode & 0o1000 and writable == folder.parent:
            assert found is None and problem(folder.parent / "not there") is None
            continue
        assert found is not None and f"{str(writable)!r} (mode {mode:o})" in found.reason
        subprocess.run(["sh", "-c", found.fix], check=True)
        assert problem(folder) is None


@pytest.mark.parametrize("which", ["folder", "above", "link"])
def test_of_another_user(folder: Path, which: str, monkeypatch) -> None:
    """Also a link: in ``/tmp``, say, anyone may make one."""
    link = folder.parent / "link"
    link.symlink_to(folder)
    assert problem(link) is None
    give_away({"folder": folder, "above": folder.parent, "link": link}[which], monkeypatch)
    found = problem(link if which == "link" else folder)
    assert found is not None and "belongs to another user" in found.reason and not found.fix


def test_links(folder: Path) -> None:
    good, bad = folder / "good", folder / "bad"
    good.mkdir()
    bad.mkdir()
    bad.chmod(0o777)
    right = {"link": "good", "whole": good, "around": Path("..") / folder.name / "good"}
    wrong = {"to bad": "bad", "to all of bad": bad}
    for name, target in (right | wrong).items():
        (folder / name).symlink_to(target)
    assert all(problem(folder / name) is None for name in right)
    assert all(problem(folder / name / "below") is not None for name in wrong)
    # The folder that holds a link decides as much as the one it leads to.
    (bad / "link").symlink_to(good)
    assert problem(bad / "link") is not None


def test_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = folder / "file"
    file.write_text("")
    (folder / "link").symlink_to(file)
    for mode, is_own in ((0o644, True), (0o664, False), (0o646, False), (0o644, True)):
        file.chmod(mode)
        assert is_own_file(file) == is_own
    assert not is_own_file(folder / "link") and not is_own_file(folder)
    give_away(file, monkeypatch)
    assert not is_own_file(file)


# ---- libraries that must not be loaded ---------------------------------------------------------
@pytest.fixture
def private(tmp_path: Path) -> Path:
    """Where libraries lie if the cache will not do."""
    return tmp_path / "lasting" / f"vision-backbones-{os.geteuid()}" / "native"


def _replace(path: Path, data: bytes) -> None:
    """In its place, not over it: this process runs what it loaded."""
    damaged = path.with_suffix(".damaged")
    damaged.write_bytes(data)
    os.replace(damaged, path)


def _with_another_bit(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 4]) + data[middle + 1 :]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path, other: _replace(path, path.read_bytes()[: path.stat().st_size // 2]),
        lambda path, other: _replace(path, _with_another_bit(path.read_bytes())),
        lambda path, other: _replace(path, other.read_bytes()),
        lambda path, other: path.chmod(0o666),
    ],
    ids=["cut off", "another bit", "another library", "writable by others"],
)
def test_a_spoilt_library_is_rebuilt(spoil, compilations, compiled, new_process) -> None:
    assert cpu.load("small").answer() == 42
    path = cpu.status("small").path
    spoil(path, compiled[13])
    new_process()
    assert cpu.load("small").answer() == 42
    assert cpu.status("small").path == path and not path.stat().st_mode & 0o022
    assert len(compilations) == 2


def _plant(sources: Path, folder: Path, library: bytes) -> Path:
    """Under the name of the right one."""
    for made in (folder.parent, folder):
        made.mkdir(mode=0o700, parents=True, exist_ok=True)
    (folder / "built").write_bytes(library)
    stem = Sources(sources).stem("small", cpu.instruction_set())
    return folders.store(folder / "built", folder, stem)


def test_a_library_of_another_system_stays(sources, compilations, private, new_process) -> None:
    """As in a home on machines of several kinds, each of which must not compile at every start."""
    foreign = _plant(sources, cpu.cache_dir(), b"the code of another system")
    for _ in range(2):
        new_process()
        assert cpu.load("small").answer() == 42
        assert cpu.status("small").path.parent == private
    assert len(compilations) == 1
    assert foreign.exists()


def test_a_planted_library_is_not_loaded(
    sources, compilations, compiled, private, caplog, new_process, warned
) -> None:
    cache = cpu.cache_dir()
    planted = _plant(sources, cache, compiled[13].read_bytes())
    assert cpu.load("small").answer() == 13  # as the user's own
    cache.chmod(0o777)
    for _ in range(2):
        new_process()
        caplog.clear()
        assert cpu.load("small").answer() == 42
        (line,) = warned()
        assert f"others may write to {str(cache)!r} (mode 777)" in line
        assert f"kept in {str(private)!r}" in line
    assert len(compilations) == 1
    assert planted.exists()
    assert cpu.status("small").path.parent == private
    for made in (private, private.parent):
        assert stat.S_IMODE(made.stat().st_mode) == 0o700


def test_plain_layers_where_both_folders_are_others(
    compilations, compiled, sources, private, warned
) -> None:
    """What lies there is not loaded, and nothing is compiled into it."""
    for taken in (cpu.cache_dir(), private):
        _plant(sources, taken, compiled[13].read_bytes())
        taken.chmod(0o777)
    assert cpu.load("small") is None
    (line,) = warned()
    for taken in (cpu.cache_dir(), private):
        assert f"others may write to {str(taken)!r}" in line
    assert not compilations


# ---- folders that will not do ------------------------------------------------------------------
def _raising(error: BaseException) -> Callable[..., None]:
    def function(*_: object, **__: object) -> None:
        raise error

    return function


def _is_below_a_file(monkeypatch) -> str:
    cpu.cache_dir().parent.write_text("")
    return str(cpu.cache_dir().parent)


def _cannot_be_written(monkeypatch) -> str:
    real = folders.tempfile.mkdtemp

    def mkdtemp(**options) -> str:
        if options["dir"] == cpu.cache_dir():
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(options["dir"]))
        return real(**options)

    monkeypatch.setattr(folders.tempfile, "mkdtemp", mkdtemp)
    return f"{os.strerror(errno.EROFS)}: {str(cpu.cache_dir())!r}"


def _has_no_home(monkeypatch) -> str:
    for name in ("VISION_BACKBONES_CACHE_DIR", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", _raising(KeyError()))
    return "there is no home for '~/.cache/vision-backbones/native'"


def _is_mounted_without_execution(monkeypatch) -> str:
    real, cache = ctypes.CDLL, str(cpu.cache_dir())

    def load(path: str) -> ctypes.CDLL:
        if path.startswith(cache):
            raise OSError(f"{path}: failed to map segment from shared object")
        return real(path)

    monkeypatch.setattr(ctypes, "CDLL", load)
    return "failed to map segment"


@pytest.mark.parametrize(
    "hindrance",
    [_is_below_a_file, _cannot_be_written, _has_no_home, _is_mounted_without_execution],
    ids=lambda hindrance: hindrance.__name__,
)
def test_a_cache_that_will_not_do(
    hindrance, compilations, sources, private, monkeypatch, caplog, new_process, warned
) -> None:
    """Each process says so once, and libraries are kept in the private folder."""
    (sources / "any" / "other.cpp").write_text("")
    said = hindrance(monkeypatch)
    for _ in range(2):
        new_process()
        caplog.clear()
        for name in ("small", "other"):
            assert cpu.load(name).answer() == 42
            assert cpu.status(name).path.parent == private
        (line,) = warned()
        assert said in line
    assert len(compilations) == (4 if hindrance is _is_mounted_without_execution else 2)


@pytest.mark.parametrize(
    "condition",
    [
        lambda _: os.umask(0),
        # As where ``~/.cache`` leads to a disk whose folders were cleared.
        lambda _: cpu.cache_dir().parent.symlink_to(cpu.cache_dir().parents[1] / "disk" / "cache"),
        lambda patch: patch.setattr(fcntl, "flock", _raising(OSError(errno.ENOLCK, "No locks"))),
    ],
    ids=["any umask", "a link", "no locks"],
)
def test_a_cache_that_will_do(condition, compilations, monkeypatch, new_process, warned) -> None:
    """Later, it may be read-only."""
    condition(monkeypatch)
    for _ in range(2):
        new_process()
        assert cpu.load("small").answer() == 42
        assert cpu.status("small").path.parent == cpu.cache_dir()
        monkeypatch.setattr(folders, "make", None)  # nothing can be created
        monkeypatch.setattr(folders.tempfile, "mkdtemp", None)
    assert len(compilations) == 1 and not warned()


def test_cache_dir(monkeypatch, tmp_path) -> None:
    monkeypatch.delenv("VISION_BACKBONES_CACHE_DIR", raising=False)
    if sys.platform not in ("darwin", "win32"):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        assert cpu.cache_dir() == tmp_path / "vision-backbones" / "native"
    monkeypatch.setenv("VISION_BACKBONES_CACHE_DIR", str(tmp_path / "mine"))
    assert cpu.cache_dir() == tmp_path / "mine" / "native"


# ---- beside other processes --------------------------------------------------------------------
def test_a_lock_that_is_never_released(compilations, monkeypatch, warned) -> None:
    """As by a process that was stopped."""
    monkeypatch.setattr(folders, "_PATIENCE_S", 0.2)
    cpu.cache_dir().mkdir(parents=True, mode=0o700)
    with (cpu.cache_dir() / "lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert cpu.load("small").answer() == 42
    waiting, going_on = warned()
    assert repr(str(cpu.cache_dir())) in waiting and "still locked" in going_on


def test_what_a_killed_process_left_is_removed_by_the_next(compilations, monkeypatch) -> None:
    """Unless another process may still be writing to it."""
    left = cpu.cache_dir() / f"{folders._SCRATCH_PREFIX}left"
    left.mkdir(parents=True)
    (left / "half.o").touch()
    for folder in (left.parent.parent, left.parent):
        folder.chmod(0o700)
    monkeypatch.setattr(folders, "_PATIENCE_S", 0.1)
    with (cpu.cache_dir() / "lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with folders.locked(cpu.cache_dir()):
            assert left.exists()
    assert cpu.load("small").answer() == 42
    assert not left.exists()
