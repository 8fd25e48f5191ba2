"""Huge pages for large results and for weights."""

from __future__ import annotations

import ctypes
import mmap
import sys
import threading
from collections.abc import Callable

import torch
from torch import Tensor

# Smaller tensors contain few whole huge pages. (glibc may reuse blocks of up to 32 MiB, whose pages
# are mapped already, but it returns free memory at the end of its heap to the system.)
_LARGE_BYTES = 4 << 20
_HUGE_PAGE, _CACHE_LINE = 2 << 20, 64
_BLOCK_BYTES = 8 << 20


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


_lock = threading.Lock()
_rest = torch.empty(0, dtype=torch.uint8, device="cpu")  # of a block that weights share


def empty_weight(count: int, dtype: torch.dtype) -> Tensor:
    """Memory on huge pages for a weight that every call reads, (count,).

    A network's weights lie on more pages of 4 KiB than a CPU has translations for. Weights of up to
    half a block share blocks, as most are smaller than a huge page; a block is freed with the last
    of them.
    """
    global _rest
    nbytes = count * dtype.itemsize
    with torch.inference_mode(False):
        if nbytes > _BLOCK_BYTES // 2 or _madvise is None:
            weight = torch.empty(count, dtype=dtype, device="cpu")
            ask_for_huge_pages(weight)
            return weight
        with _lock:
            if len(_rest) < nbytes:
                block = torch.empty(_BLOCK_BYTES + _HUGE_PAGE, dtype=torch.uint8, device="cpu")
                _rest = block[-block.data_ptr() % _HUGE_PAGE :][:_BLOCK_BYTES]
                ask_for_huge_pages(_rest)
            taken = -(-nbytes // _CACHE_LINE) * _CACHE_LINE
            weight, _rest = _rest[:nbytes].view(dtype), _rest[taken:]
    return weight
