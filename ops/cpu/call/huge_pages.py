"""Huge pages for large results."""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Callable

from torch import Tensor

__all__ = ["ask_for_huge_pages"]

# Smaller tensors contain few whole huge pages. (glibc may reuse blocks of up to 32 MiB, whose pages
# are mapped already, but it returns free memory at the end of its heap to the system.)
_LARGE_BYTES = 4 << 20


def _load_madvise() -> Callable[..., int] | None:
    if sys.platform != "linux" or not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    madvise = getattr(ctypes.CDLL(None), "madvise", None)
    if madvise is not None:
        madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return madvise


_madvise = _load_madvise()


def ask_for_huge_pages(*tensors: Tensor) -> None:
    """Request huge pages for contiguous CPU tensors fresh from ``torch.empty``, not yet written.

    The memory of a large tensor is newly mapped at every call, and writing it faults on each page:
    with 4 KiB pages, the faults take longer than the writes; with huge pages (2 MiB), a third of
    that. Linux gives huge pages to all allocations or only on request, depending on
    ``/sys/kernel/mm/transparent_hugepage/enabled``; numpy requests them, torch does not. It is only
    a hint and doesn't affect values. Does nothing for small tensors and on other systems.
    """
    if _madvise is None:
        return
    for t in tensors:
        if t.nbytes < _LARGE_BYTES:
            continue
        start = t.data_ptr()
        first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (start + t.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        _madvise(first, end - first, mmap.MADV_HUGEPAGE)
