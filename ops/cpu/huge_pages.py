"""Large results in huge pages."""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Callable

from torch import Tensor

__all__ = ["ask_for_huge_pages"]

# Smaller tensors hold few whole huge pages. (glibc may keep blocks of up to 32 MiB for the next
# call, where their pages are at hand, but it gives back what lies free at the end of its heap.)
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
    """Call it on contiguous CPU tensors that are fresh from ``torch.empty``, before filling them.

    The memory of a large tensor is new at every call, and writing it stops at each page until the
    system has found and cleared one: with pages of 4 KiB that takes longer than the writing itself,
    with huge pages (2 MiB) a third of that. Linux hands them out to all or to those who ask, as
    ``/sys/kernel/mm/transparent_hugepage/enabled`` says; numpy asks, torch does not. It is advice:
    the values are the same whether it is heeded or not. On small tensors and other systems this
    does nothing.
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
