"""The C library's heap, from which torch allocates CPU tensors."""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from typing import Any

__all__ = ["keep_freed_memory", "return_freed_memory"]

# <malloc.h>
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGEST_MMAP_THRESHOLD = 32 << 20  # which glibc accepts
_MOST_KEPT_BYTES = 256 << 20
_OPTIONS = ("TRIM_THRESHOLD", "MMAP_THRESHOLD", "MMAP_MAX", "TOP_PAD")  # of the environment


@functools.cache  # once is enough
def keep_freed_memory() -> None:
    """Make malloc reuse the memory of large maps.

    glibc returns freed memory to the system, large blocks one by one and the end of the heap from
    128 KiB on, and writing the next map then causes a page fault per page: half of the time of
    VAN-B0 for eight images, if our kernels, which have their own workspace, are unavailable.
    Afterwards, it keeps blocks of up to 32 MiB and 256 MiB in all (``man mallopt``).

    No effect if the environment sets one of malloc's options, or with another C library.
    """
    is_set = any(f"MALLOC_{name}_" in os.environ for name in _OPTIONS)
    is_set |= "glibc.malloc" in os.getenv("GLIBC_TUNABLES", "")
    libc = _libc()
    if libc is not None and not is_set:
        libc.mallopt(_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
        libc.mallopt(_TRIM_THRESHOLD, _MOST_KEPT_BYTES)


def return_freed_memory() -> None:
    """Return memory that malloc keeps to the system; no effect with other libraries than glibc."""
    libc = _libc()
    if libc is not None:
        libc.malloc_trim(0)


@functools.cache
def _libc() -> Any:
    """The C library of the process if it is glibc."""
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None
