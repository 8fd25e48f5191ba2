"""Check that nobody else controls a path: a loaded library runs with all the user's rights.

As ssh and sudo require of their files, every folder on the path must belong to the user or root and
be writable by nobody else. Sticky folders such as ``/tmp`` may be world-writable, since nobody can
move another user's files there. Windows has access lists instead, which are not checked.
"""

from __future__ import annotations

import errno
import os
import shlex
import stat
import sys
from pathlib import Path
from typing import NamedTuple

__all__ = ["Problem", "is_own_file", "permission_problem", "shell_word"]

_MOST_LINKS = 40  # in the resolution of one path, as on Linux
_ACCESS_LIST = "system.posix_acl_access"


class Problem(NamedTuple):
    """What is wrong with a folder, and a shell command that fixes it ("" if there is none)."""

    reason: str
    fix: str = ""


def permission_problem(path: Path) -> Problem | None:
    """Why others can change the contents of ``path``; None if only the user and root can.

    Missing folders are not checked: they will belong to whoever creates them.

    Raises:
        OSError: the path cannot be checked: a loop of links, a file as a folder, no permission.
    """
    if sys.platform == "win32":
        return None
    rest = list(reversed(path.absolute().parts))
    place, links = Path(rest.pop()), 0
    while True:
        try:
            found = place.lstat()
        except FileNotFoundError:
            return None
        is_last = not rest
        if not _is_trusted(found.st_uid, is_last):
            return Problem(f"{str(place)!r} belongs to another user ({found.st_uid})")
        if stat.S_ISLNK(found.st_mode):
            links += 1
            if links > _MOST_LINKS:
                raise OSError(f"{str(path)!r} is a loop of symbolic links")
            target = Path(os.readlink(place))
            rest += reversed(target.parts)
            place = Path(rest.pop()) if target.is_absolute() else place.parent
        elif _others_may_write(place, found) and (is_last or not found.st_mode & stat.S_ISVTX):
            own = found.st_uid == os.geteuid()
            return Problem(
                f"others may write to {str(place)!r} (mode {stat.S_IMODE(found.st_mode):o})",
                f"chmod go-w {shell_word(place)}" if own else "",
            )
        if not rest:
            return None
        place /= rest.pop()


def shell_word(path: Path) -> str:
    """``path`` quoted for a shell, on one line, in printable characters."""
    if str(path).isprintable():
        return shlex.quote(str(path))
    escaped = (
        chr(byte) if 32 <= byte < 127 and byte not in b"'\\" else f"\\x{byte:02x}"
        for byte in os.fsencode(path)
    )
    return f"$'{''.join(escaped)}'"


def is_own_file(path: Path) -> bool:
    """Whether ``path`` is a regular file of the user or root that nobody else can write to."""
    found = path.lstat()
    if not stat.S_ISREG(found.st_mode):
        return False
    if sys.platform == "win32":
        return True
    return _is_trusted(found.st_uid, is_last=True) and not found.st_mode & 0o022


def _is_trusted(uid: int, is_last: bool) -> bool:
    if uid in (0, os.geteuid()):
        return True
    # In a container that maps only the user, root's folders appear to belong to "nobody".
    return not is_last and uid == _unmapped_root()


def _unmapped_root() -> int | None:
    """The apparent owner of root's files if the user namespace has no root; None if it has."""
    try:
        ranges = Path("/proc/self/uid_map").read_text().splitlines()
        if any(line.split()[0] == "0" for line in ranges):
            return None
        return int(Path("/proc/sys/kernel/overflowuid").read_text())
    except (OSError, ValueError, IndexError):
        return None


def _others_may_write(place: Path, found: os.stat_result) -> bool:
    if found.st_mode & stat.S_IWOTH:
        return True
    return bool(found.st_mode & stat.S_IWGRP) and not _is_private_group(place, found)


def _is_private_group(place: Path, found: os.stat_result) -> bool:
    """Whether the owner is the only member of the group of ``place``, as with a umask of 002."""
    import grp
    import pwd

    try:
        owner, group = pwd.getpwuid(found.st_uid), grp.getgrgid(found.st_gid)
    except KeyError:
        return False
    if owner.pw_gid != found.st_gid or owner.pw_name != group.gr_name:
        return False
    if not set(group.gr_mem) <= {owner.pw_name}:
        return False
    # With an access list, the group bits are the mask of the list's permissions.
    try:
        return sys.platform != "linux" or _ACCESS_LIST not in os.listxattr(place)
    except OSError as error:
        return error.errno == errno.ENOTSUP
