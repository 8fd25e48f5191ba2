"""The cache of compiled libraries: location, safety, and fallbacks."""

from __future__ import annotations

import _ctypes
import contextlib
import ctypes
import errno
import fcntl
import logging
import os
import pwd
import shutil
import stat
import time
from pathlib import Path

import pytest

from ops import cpu
from ops.cpu import build, cache, compiler, libraries, openmp


def _warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


@pytest.fixture
def private(tmp_path: Path) -> Path:
    """Where libraries lie if the cache will not do."""
    return tmp_path / "lasting" / f"vision-backbones-{os.geteuid()}" / "native"


def _cut_off(path: Path) -> bytes:
    return path.read_bytes()[: path.stat().st_size // 2]


def _with_another_bit(path: Path) -> bytes:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    return bytes(data)


@pytest.mark.parametrize("damage", [_cut_off, _with_another_bit, lambda path: b""])
def test_a_damaged_library_is_rebuilt(damage, compilations, new_process) -> None:
    assert cpu.load("small").answer() == 42
    path = cpu.status("small").path
    # In its place, not over it: this process runs what it loaded.
    damaged = path.with_suffix(".damaged")
    damaged.write_bytes(damage(path))
    os.replace(damaged, path)
    new_process()
    assert cpu.load("small").answer() == 42
    assert cpu.status("small").path == path
    assert len(compilations) == 2
    assert cache.find(path.parent, path.stem.rpartition("-")[0]) == [path]


def test_a_replaced_library_is_rebuilt(compilations, compiled, new_process) -> None:
    assert cpu.load("small").answer() == 42
    path = cpu.status("small").path
    path.unlink()
    shutil.copyfile(compiled[13], path)
    new_process()
    assert cpu.load("small").answer() == 42
    assert len(compilations) == 2


def test_a_library_of_another_system_stays(compilations, tmp_path, new_process) -> None:
    """As in a home on machines of several kinds, each of which must not compile at every start."""
    isa = cpu.instruction_set()
    stem = libraries.stem("small", isa)
    folder = cpu.cache_dir()
    folder.mkdir(parents=True)
    (folder / "built").write_bytes(b"the code of another system")
    foreign = cache.store(folder / "built", folder, stem)
    for _ in range(2):
        new_process()
        assert cpu.load("small").answer() == 42
    assert len(compilations) == 1
    assert foreign.exists()


def test_checking_a_library_takes_less_than_5_ms(tmp_path) -> None:
    (tmp_path / "built").write_bytes(os.urandom(400_000))  # the largest kernels are as large
    path = cache.store(tmp_path / "built", tmp_path, "small")
    times = []
    for _ in range(10):
        start = time.perf_counter()
        assert cache.problem(tmp_path) is None and cache.find(tmp_path, "small") == [path]
        times.append(time.perf_counter() - start)
    assert min(times) < 5e-3


# ---- folders that will not do ------------------------------------------------------------------
def test_a_planted_library_is_not_loaded(
    compilations, compiled, private, caplog, new_process
) -> None:
    folder = cpu.cache_dir()
    folder.mkdir(parents=True)
    isa = cpu.instruction_set()
    shutil.copyfile(compiled[13], folder / "built")
    planted = cache.store(folder / "built", folder, libraries.stem("small", isa))
    assert cpu.load("small").answer() == 13  # as the user's own
    folder.chmod(0o777)
    for _ in range(2):
        new_process()
        caplog.clear()
        assert cpu.load("small").answer() == 42
        (line,) = _warnings(caplog)
        assert f"others may write to {str(folder)!r} (mode 777)" in line
        assert f"kept in {str(private)!r}" in line
    assert len(compilations) == 1
    assert planted.exists()
    assert cpu.status("small").path.parent == private
    for made in (private, private.parent):
        assert stat.S_IMODE(made.stat().st_mode) == 0o700


def test_a_world_writable_library_is_rebuilt(compilations, new_process) -> None:
    assert cpu.load("small").answer() == 42
    path = cpu.status("small").path
    path.chmod(0o666)
    new_process()
    assert cpu.load("small").answer() == 42
    assert len(compilations) == 2
    assert not path.stat().st_mode & 0o022


def test_the_cache_works_with_any_umask(sources, new_process, caplog) -> None:
    before = os.umask(0)
    try:
        assert cpu.load("small").answer() == 42
    finally:
        os.umask(before)
    new_process()
    assert cpu.load("small").answer() == 42
    assert cpu.status("small").path.parent == cpu.cache_dir()
    assert not _warnings(caplog)


def _file(folder: Path) -> None:
    folder.parent.mkdir()
    folder.write_text("")


def _below_a_file(folder: Path) -> None:
    folder.parent.write_text("")


def _loop_of_links(folder: Path) -> None:
    folder.parent.mkdir()
    folder.symlink_to(folder)


@pytest.mark.parametrize("make", [_file, _below_a_file, _loop_of_links])
def test_a_cache_that_is_a_file(make, compilations, private, caplog) -> None:
    make(cpu.cache_dir())
    assert cpu.load("small").answer() == 42
    assert cpu.status("small").path.parent == private
    (line,) = _warnings(caplog)
    assert str(cpu.cache_dir().parent) in line


def test_a_linked_cache_is_created(compilations, tmp_path, caplog) -> None:
    """As where ``~/.cache`` leads to a disk whose folders were cleared."""
    (tmp_path / "cache").symlink_to(tmp_path / "disk" / "cache")
    assert cpu.load("small").answer() == 42
    assert list((tmp_path / "disk" / "cache" / "native").glob("*.so"))
    assert not _warnings(caplog)


@pytest.mark.parametrize("error", [errno.EACCES, errno.EROFS, errno.EDQUOT])
def test_a_cache_that_cannot_be_written(
    error, compilations, private, monkeypatch, caplog, new_process
) -> None:
    real = cache.tempfile.mkdtemp

    def mkdtemp(**options) -> str:
        if options["dir"] == cpu.cache_dir():
            raise OSError(error, os.strerror(error), str(options["dir"]))
        return real(**options)

    monkeypatch.setattr(cache.tempfile, "mkdtemp", mkdtemp)
    for _ in range(2):
        new_process()
        caplog.clear()
        assert cpu.load("small").answer() == 42
        assert cpu.status("small").path.parent == private
        (line,) = _warnings(caplog)
        assert f"{os.strerror(error)}: {str(cpu.cache_dir())!r}" in line
    assert len(compilations) == 1


def test_a_read_only_cache_is_used(compilations, monkeypatch, new_process, caplog) -> None:
    assert cpu.load("small").answer() == 42
    new_process()
    cache.mark_unusable(cpu.cache_dir(), PermissionError(errno.EACCES, "Permission denied"))
    assert cpu.load("small").answer() == 42
    assert cpu.status("small").path.parent == cpu.cache_dir()
    assert not _warnings(caplog)


def test_a_cache_that_cannot_be_read(compilations, private, monkeypatch, caplog) -> None:
    real = os.listdir

    def listdir(folder: Path) -> list[str]:
        if folder == cpu.cache_dir():
            raise PermissionError(errno.EACCES, "Permission denied", str(folder))
        return real(folder)

    monkeypatch.setattr(cache.os, "listdir", listdir)
    assert cpu.load("small").answer() == 42
    assert cpu.status("small").path.parent == private
    assert len(_warnings(caplog)) == 1


def test_a_user_without_a_home(compilations, private, monkeypatch, caplog) -> None:
    def unknown(uid: int) -> None:
        raise KeyError(uid)

    for name in ("VISION_BACKBONES_CACHE_DIR", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    assert cpu.load("small").answer() == 42
    assert cpu.status("small").path.parent == private
    (line,) = _warnings(caplog)
    assert "there is no home for '~/.cache/vision-backbones/native'" in line


def test_a_full_disk(compilations, private, monkeypatch, caplog, new_process) -> None:
    """Where it shows before compiling; :mod:`test_build` has the others."""
    usage = type(shutil.disk_usage("/"))
    monkeypatch.setattr(
        cache.shutil,
        "disk_usage",
        lambda folder: usage(9, 9, 0 if folder == cpu.cache_dir() else 10**9),
    )
    for _ in range(2):
        new_process()
        caplog.clear()
        assert cpu.load("small").answer() == 42
        (line,) = _warnings(caplog)
        assert "No space left on device" in line
    assert len(compilations) == 1
    assert not list(cpu.cache_dir().iterdir())


def test_a_noexec_mount(compilations, private, monkeypatch, caplog, new_process) -> None:
    real = os.statvfs

    def statvfs(folder: Path):
        found = real(folder)
        if "cache" not in Path(folder).parts:
            return found
        return type(found)((*found[:8], found.f_flag | os.ST_NOEXEC, *found[9:]))

    cpu.cache_dir().mkdir(parents=True)
    monkeypatch.setattr(cache.os, "statvfs", statvfs)
    for _ in range(2):
        new_process()
        caplog.clear()
        assert cpu.load("small").answer() == 42
        assert cpu.status("small").path.parent == private
        (line,) = _warnings(caplog)
        assert "noexec" in line
    assert len(compilations) == 1


def test_a_folder_that_disallows_execution(
    compilations, private, monkeypatch, caplog, new_process
) -> None:
    """As a policy of the system may have it; the mount's options do not tell."""
    real = ctypes.CDLL

    def load(path: str) -> ctypes.CDLL:
        if path.startswith(str(cpu.cache_dir())):
            raise OSError(f"{path}: failed to map segment from shared object")
        return real(path)

    monkeypatch.setattr(build.ctypes, "CDLL", load)
    monkeypatch.setattr(cache, "allows_execution", lambda path: path.parent != cpu.cache_dir())
    for _ in range(2):
        new_process()
        caplog.clear()
        assert cpu.load("small").answer() == 42
        (line,) = _warnings(caplog)
        assert "lets no code run" in line
    assert len(compilations) == 2  # once in each folder


def test_execution_is_allowed_here(compiled) -> None:
    assert cache.allows_execution(compiled[42])


def test_squatted_private_folders(compilations, private, tmp_path, caplog) -> None:
    """A folder of this process alone is left, and removed in the end."""
    cpu.cache_dir().mkdir(parents=True, mode=0o700)
    for folder in (cpu.cache_dir(), private, tmp_path / "temporary" / private.parent.name):
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o777)
    assert cpu.load("small").answer() == 42
    (folder,) = cache._temporary
    assert cpu.status("small").path.parent == folder
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert len(_warnings(caplog)) == 1
    cache._remove_temporary(os.getpid() + 1)  # a fork leaves it alone
    assert folder.exists()
    cache._remove_temporary(os.getpid())
    assert not folder.exists()


def test_a_private_folder_created_concurrently_by_another_user(
    compilations, private, monkeypatch
) -> None:
    """Between the look at the place and the making of a folder."""
    cpu.cache_dir().parent.write_text("")
    real = cache._make

    def make(folder: Path, mode: int) -> None:
        real(folder, mode)
        if folder == private:
            folder.chmod(0o777)

    monkeypatch.setattr(cache, "_make", make)
    assert cpu.load("small").answer() == 42
    assert cpu.status("small").path.parent != private


def test_odd_names(sources, tmp_path, monkeypatch, new_process, caplog) -> None:
    name = os.fsdecode("with spaces, 'quotes', ä\n and ".encode() + b"\xff [bytes] $HOME")
    monkeypatch.setenv("VISION_BACKBONES_CACHE_DIR", str(tmp_path / name))
    with caplog.at_level(logging.INFO, logger="ops.cpu"):
        first = cpu.load("small")
    assert first.answer() == 42 and openmp.runtime() is not None
    (line,) = [r.getMessage() for r in caplog.records]
    assert line.isprintable()
    monkeypatch.setattr(compiler, "run", None)  # not called again
    new_process()
    second = cpu.load("small")
    assert second.answer() == 42
    for library in (first, second):  # scikit-learn cannot read the names of libraries like this
        _ctypes.dlclose(library._handle)
    assert cpu.status("small").path.parent == tmp_path / name / "native"


@pytest.mark.parametrize("there", [True, False])
def test_the_order_of_private_folders(there, sources, private, tmp_path, monkeypatch) -> None:
    runtime = tmp_path / "runtime"
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))
    between = []
    if there:
        runtime.mkdir()
        between = [runtime / "vision-backbones" / "native"]
    last = tmp_path / "temporary" / private.parent.name / "native"
    assert list(cache.folders()) == [cpu.cache_dir(), private, *between, last]


# ---- beside other processes --------------------------------------------------------------------
def _lock_of_small() -> Path:
    isa = cpu.instruction_set()
    return cpu.cache_dir() / f"{libraries.stem('small', isa)}.lock"


def test_a_lock_that_is_never_released(compilations, monkeypatch, caplog) -> None:
    """As by a process that was stopped."""
    monkeypatch.setattr(cache, "_LOCK_PATIENCE_S", 0.2)
    cpu.cache_dir().mkdir(parents=True)
    with _lock_of_small().open("w") as held:
        held.write("4711\n")
        held.flush()
        fcntl.flock(held, fcntl.LOCK_EX)
        start = time.monotonic()
        assert cpu.load("small").answer() == 42
        assert 0.2 <= time.monotonic() - start < 5
    (line,) = _warnings(caplog)
    assert line.startswith("Process 4711 has held ")
    assert line.endswith("going on without it")


def test_a_lock_is_released_despite_a_fork(compilations) -> None:
    folder = cpu.cache_dir()
    folder.mkdir(parents=True)
    with cache.locked(folder / "x.lock"):
        (descriptor,) = (
            int(fd)
            for fd in os.listdir("/proc/self/fd")
            if os.path.realpath(f"/proc/self/fd/{fd}") == str(folder / "x.lock")
        )
        fork = os.dup(descriptor)
    try:
        with (folder / "x.lock").open() as other:
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.close(fork)


@pytest.mark.parametrize("where", ["open", "flock"])
def test_an_unavailable_lock(where, compilations, monkeypatch, caplog) -> None:
    """One of another user, or a network's disk without locks: the instructions stay."""
    if where == "open":
        cpu.cache_dir().mkdir(parents=True)
        _lock_of_small().mkdir()  # for root, too
    else:

        def flock(file: int, operation: int) -> None:
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr(fcntl, "flock", flock)
    assert cpu.load("small").answer() == 42
    assert cpu.status("small").instruction_set == cpu.instruction_set()
    assert not _warnings(caplog)


@pytest.mark.parametrize("state", ["left", "young", "held"])
def test_leftover_scratch_folders(state, compilations) -> None:
    left = cpu.cache_dir() / f"{cache._SCRATCH_PREFIX}abc"
    left.mkdir(parents=True)
    (left / "half.s").write_text("")
    if state != "young":
        old = time.time() - 2 * cache._STALE_S
        os.utime(left, (old, old))
    with contextlib.ExitStack() as stack:
        if state == "held":
            stack.enter_context(cache._locked_folder(left))
        assert cpu.load("small").answer() == 42
    assert left.exists() == (state != "left")
