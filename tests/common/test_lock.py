"""Locks of folders: one holder at a time, also while the last one is leaving."""

from __future__ import annotations

import fcntl
from typing import Any

import pytest

from backbones.common.lock import LOCK_NAME, FolderLock, LockedError


def test_a_lock_on_a_file_that_its_last_holder_removed_is_none(tmp_path, monkeypatch):
    plain, removed = fcntl.flock, []

    def flock(*arguments: Any) -> None:
        if not removed:
            removed.append((tmp_path / LOCK_NAME).unlink())
        plain(*arguments)

    monkeypatch.setattr(fcntl, "flock", flock)
    lock = FolderLock(tmp_path)
    with pytest.raises(LockedError, match="process "):
        FolderLock(tmp_path)
    lock.release()
    FolderLock(tmp_path).release()
    assert removed and not list(tmp_path.iterdir())
