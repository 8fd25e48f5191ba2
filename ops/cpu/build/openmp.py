"""Torch's OpenMP runtime, whose threads the kernels share.

A second runtime in the process would create its own thread pool, and both would compete for the
same cores. Which runtime is loaded varies: wheels bring a renamed ``libgomp``, conda and macOS use
LLVM's, ``LD_PRELOAD`` can select any, and on Windows it is Intel's. So kernels are not linked with
OpenMP; each receives pointers to functions that all these runtimes have.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from pathlib import Path

import torch

# In the order of `parallel_use` in common/parallel.h.
_FUNCTIONS: tuple[str, ...] = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")
if sys.platform == "win32":
    _FORK = ("__kmpc_fork_call", "__kmpc_push_num_threads", "__kmpc_global_thread_num")
    _FUNCTIONS = (*_FORK, *_FUNCTIONS[1:])


def use_torch_threads(library: ctypes.CDLL) -> None:
    """Let the kernels of ``library`` use torch's threads; without a runtime they use one thread."""
    try:
        use = library.parallel_use
    except (AttributeError, UnicodeDecodeError):  # the error quotes the path, whatever its bytes
        return  # a kernel without parallel work
    if (functions := _functions()) is not None:
        use(*map(ctypes.c_void_p, functions))


def runtime() -> Path | None:
    """The file of torch's OpenMP runtime; None if there is none or it cannot be determined."""
    functions = _functions()
    if functions is None or sys.platform != "linux":
        return None
    for mapped in Path("/proc/self/maps").read_bytes().splitlines():
        line = os.fsdecode(mapped)  # names may have any bytes
        begin, _, end = line.partition(" ")[0].partition("-")
        if int(begin, 16) <= functions[0] < int(end, 16):
            return Path(line.split(maxsplit=5)[5])
    return None


@functools.cache
def _functions() -> tuple[int, ...] | None:
    """The addresses of the functions that torch's parallel regions call."""
    # The loader resolves torch's symbols in the process first, where a preloaded runtime precedes
    # torch's own; on macOS, only in torch's libraries. Windows knows no symbols of a process.
    torch_itself = torch._C.__file__
    places = {"darwin": (torch_itself,), "win32": ("libiomp5md.dll",)}
    for path in places.get(sys.platform, (None, torch_itself)):
        try:
            library = ctypes.CDLL(path)
            found = (ctypes.cast(getattr(library, name), ctypes.c_void_p) for name in _FUNCTIONS)
            return tuple(address.value or 0 for address in found)
        except (AttributeError, OSError):
            continue
    return None
