"""Who else may change the contents of a path."""

from __future__ import annotations

import grp
import os
import pwd
import subprocess
import types
from pathlib import Path

import pytest

from ops.cpu import trust
from ops.cpu.trust import is_own_file, permission_problem, shell_word


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "above" / "folder"
    made.mkdir(parents=True, mode=0o755)
    made.parent.chmod(0o755)
    return made


def give_away(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``path`` is another user's afterwards; unless root runs the tests, all else is, too."""
    if os.geteuid() == 0:
        os.chown(path, 12345, -1)
    else:
        monkeypatch.setattr(trust.os, "geteuid", lambda: 12345)


@pytest.fixture
def no_private_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trust, "_is_private_group", lambda place, found: False)


def test_own_folders(folder: Path) -> None:
    assert permission_problem(folder) is None
    assert permission_problem(folder / "not" / "there") is None


@pytest.mark.parametrize("mode", [0o777, 0o757, 0o775, 0o1777])
def test_a_writable_folder(folder: Path, mode: int, no_private_groups) -> None:
    folder.chmod(mode)
    problem = permission_problem(folder)
    assert problem is not None
    assert problem.reason == f"others may write to {str(folder)!r} (mode {mode:o})"
    subprocess.run(["sh", "-c", problem.fix], check=True)
    assert permission_problem(folder) is None


@pytest.mark.parametrize("mode", [0o777, 0o775])
def test_a_writable_parent(folder: Path, mode: int, no_private_groups) -> None:
    folder.parent.chmod(mode)
    problem = permission_problem(folder)
    assert problem is not None and repr(str(folder.parent)) in problem.reason
    # In a sticky one nobody can move what is another's.
    folder.parent.chmod(mode | 0o1000)
    assert permission_problem(folder) is None
    assert permission_problem(folder.parent / "not there") is None


def test_a_group_of_the_user_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the umask is 002."""
    folder.chmod(0o775)
    gid = folder.stat().st_gid
    user = types.SimpleNamespace(pw_name="someone", pw_gid=gid)
    group = types.SimpleNamespace(gr_name="someone", gr_mem=[])
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: user)
    monkeypatch.setattr(grp, "getgrgid", lambda gid: group)
    assert permission_problem(folder) is None
    group.gr_mem = ["someone", "another"]
    assert permission_problem(folder) is not None
    group.gr_mem, group.gr_name = [], "users"
    assert permission_problem(folder) is not None
    group.gr_name, user.pw_gid = "someone", gid + 1
    assert permission_problem(folder) is not None
    user.pw_gid = gid
    monkeypatch.setattr(trust.os, "listxattr", lambda path: ["system.posix_acl_access"])
    assert permission_problem(folder) is not None


def test_a_group_that_the_system_does_not_know(folder: Path, monkeypatch) -> None:
    def unknown(number: int) -> None:
        raise KeyError(number)

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    folder.chmod(0o775)
    assert permission_problem(folder) is not None


@pytest.mark.parametrize("which", ["folder", "above"])
def test_a_folder_of_another_user(folder: Path, which: str, monkeypatch) -> None:
    give_away(folder if which == "folder" else folder.parent, monkeypatch)
    problem = permission_problem(folder)
    assert problem is not None and "belongs to another user" in problem.reason and not problem.fix


def test_links(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good, bad = folder / "good", folder / "bad"
    good.mkdir()
    bad.mkdir()
    bad.chmod(0o777)
    (folder / "link").symlink_to("good")
    (folder / "around").symlink_to(Path("..") / folder.name / "good")
    (folder / "whole").symlink_to(good)
    assert all(permission_problem(folder / name) is None for name in ("link", "around", "whole"))
    (folder / "wrong").symlink_to(bad)
    assert permission_problem(folder / "wrong" / "below") is not None
    # The folder that holds a link decides as much as the one it leads to.
    (bad / "link").symlink_to(good)
    assert permission_problem(bad / "link") is not None
    (folder / "loop").symlink_to("loop")
    with pytest.raises(OSError, match="loop of symbolic links"):
        permission_problem(folder / "loop")


def test_a_link_of_another_user(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In ``/tmp``, say, where anyone may make one."""
    (folder.parent / "link").symlink_to(folder)
    assert permission_problem(folder.parent / "link") is None
    if os.geteuid() == 0:
        os.lchown(folder.parent / "link", 12345, -1)
    else:
        give_away(folder.parent / "link", monkeypatch)
    assert permission_problem(folder.parent / "link") is not None


def test_a_container_that_maps_only_the_user(folder: Path, monkeypatch) -> None:
    """Root's folders seem to be nobody's there; what is nobody's itself is not the user's."""
    (folder / "own").mkdir()
    monkeypatch.setattr(trust.os, "geteuid", lambda: 12345)
    nobody = folder.stat().st_uid or 65534
    real = Path.lstat

    def lstat(path: Path) -> os.stat_result:
        found = list(real(path))
        found[4] = 12345 if path.name == "own" else nobody
        return os.stat_result(found)

    monkeypatch.setattr(Path, "lstat", lstat)
    assert permission_problem(folder / "own") is not None
    monkeypatch.setattr(trust, "_unmapped_root", lambda: nobody)
    assert permission_problem(folder / "own") is None
    assert permission_problem(folder) is not None


def test_the_map_of_users(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = {
        "/proc/self/uid_map": "  0  0  4294967295\n",
        "/proc/sys/kernel/overflowuid": "65534\n",
    }
    monkeypatch.setattr(Path, "read_text", lambda path: texts[str(path)])
    assert trust._unmapped_root() is None
    texts["/proc/self/uid_map"] = "  1000  1000  1\n"
    assert trust._unmapped_root() == 65534


def test_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = folder / "file"
    file.write_text("")
    file.chmod(0o644)
    (folder / "link").symlink_to(file)
    assert is_own_file(file)
    assert not is_own_file(folder / "link")
    assert not is_own_file(folder)
    for mode in (0o664, 0o646):
        file.chmod(mode)
        assert not is_own_file(file)
    file.chmod(0o644)
    give_away(file, monkeypatch)
    assert not is_own_file(file)


@pytest.mark.parametrize("name", [b"plain", b"two words", b"a\nb", b"it's \xff\\", "ä".encode()])
def test_shell_quoting(name: bytes) -> None:
    word = shell_word(Path(os.fsdecode(name)))
    assert word.isprintable()
    done = subprocess.run(["bash", "-c", f"printf %s {word}"], capture_output=True, check=True)
    assert done.stdout == name
