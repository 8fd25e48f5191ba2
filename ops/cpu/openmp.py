"""The OpenMP runtime that torch has loaded, whose threads the kernels share.

A second one in a process would keep a pool of threads of its own, and both would run on the same
cores. Which one is loaded differs: ``libgomp`` under a name of its own in a wheel, LLVM's in conda
and on macOS, whatever ``LD_PRELOAD`` says. So no kernel is linked with any; each is given three
functions, which all of these have.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from pathlib import Path

import torch

__all__ = ["give_threads", "runtime"]

# In the order of `parallel_use` in common/parallel.h.
_FUNCTIONS = "GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads"


def give_threads(library: ctypes.CDLL) -> None:
    """Let the kernels of ``library`` share torch's threads; they use one if it has none."""
    try:
        use = library.parallel_use
    except (AttributeError, UnicodeDecodeError):  # the error quotes the path, whatever its bytes
        return  # not all have work to share
    if (functions := _functions()) is not None:
        use(*map(ctypes.c_void_p, functions))


def runtime() -> Path | None:
    """The file of torch's OpenMP runtime; None if it has none, or the system does not tell."""
    functions = _functions()
    if functions is None or sys.platform != "linux":
        return None
    for line in Path("/proc/self/maps").read_text().splitlines():
        begin, _, end = line.partition(" ")[0].partition("-")
        if int(begin, 16) <= functions[0] < int(end, 16):
            return Path(line.split(maxsplit=5)[5])
    return None


@functools.cache
def _functions() -> tuple[int, ...] | None:
    """The addresses of what regions of torch call."""
    # The system looks for torch's functions among those of the process first, where a preloaded
    # runtime comes before the one that torch brings; on macOS, at torch's libraries alone.
    torch_itself = torch._C.__file__
    for path in (torch_itself,) if sys.platform == "darwin" else (None, torch_itself):
        try:
            library = ctypes.CDLL(path)
            found = (ctypes.cast(getattr(library, name), ctypes.c_void_p) for name in _FUNCTIONS)
            return tuple(address.value or 0 for address in found)
        except (AttributeError, OSError):
            continue
    return None
