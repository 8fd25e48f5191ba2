"""Dictionaries that tell when they change: CPython's watchers, which it has from 3.12 on.

Before a watched dictionary changes, Python calls a function in C that notes which one. Classes are
watched by their dictionaries, too: ``PyType_Watch`` tells of one change only until the class is
looked at again, and in Python 3.13 of none after the 999th.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Collection
from typing import Any

from ops.cpu.build import status
from ops.fuse.layout import changed_dictionary

__all__ = ["Watcher", "watcher"]

_LAST = 1024  # changes that are remembered, as in replay.cpp


class Watcher:
    """Tells which dictionaries change; ``changes`` returns how often they did, from ``address``."""

    def __init__(self) -> None:
        library = ctypes.PyDLL(str(status("replay").path))  # which holds the GIL
        library.replay_read_changes.restype = ctypes.c_int64
        self.changes: Callable[[], int] = library.replay_read_changes
        self.address = ctypes.addressof(ctypes.c_int64.in_dll(library, "replay_changes"))
        self._changed = (ctypes.c_int64 * _LAST).in_dll(library, "replay_changed")
        self._number: int | None = None  # of Python's watcher
        try:
            library.replay_watch(ctypes.cast(ctypes.pythonapi.PyDict_GetItem, ctypes.c_void_p))
            self._number = ctypes.pythonapi.PyDict_AddWatcher(library.replay_note_change)
        except (AttributeError, RuntimeError):  # an older Python, or others have all watchers
            return
        self._tells_of = {of_object: self._tells(of_object) for of_object in (True, False)}

    def watch(self, held: dict[Any, Any], *, of_object: bool = False) -> bool:
        """Watch a dictionary from now on; False if not all changes of such would be seen.

        Args:
            of_object: it has the attributes of an object. Of assignments to those that an object
                keeps without their names, Python 3.13 doesn't tell.
        """
        if self._number is None or not self._tells_of[of_object]:
            return False
        ctypes.pythonapi.PyDict_Watch(self._number, ctypes.py_object(held))
        return True

    def changed(self, since: int, until: int) -> Collection[int] | None:
        """The identities of dictionaries that changed between two counts; None if too many did."""
        if until - since > _LAST:
            return None
        return {self._changed[i % _LAST] for i in range(since, until)}

    def _tells(self, of_object: bool) -> bool:
        """Whether Python tells of each change of such a dictionary."""
        held, changes = changed_dictionary(of_object=of_object)
        ctypes.pythonapi.PyDict_Watch(self._number, ctypes.py_object(held))
        for change in changes:
            before = self.changes()
            change()
            if self.changes() == before:
                return False
        return True


@functools.cache
def watcher() -> Watcher:
    """The one of this process: Python has eight."""
    return Watcher()
