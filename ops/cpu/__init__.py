"""C++ kernels, shipped compiled in wheels, otherwise compiled on first use.

A kernel is one ``.cpp`` file in a subfolder and the headers next to it. It has a plain C interface
and includes no torch headers, so it compiles in seconds and does not depend on the torch version.
:func:`load` returns its library, or ``None`` if it is unavailable. The caller then falls back to
pure torch, and :func:`unavailable_reason` returns the reason.

A wheel has a library for each kernel and instruction set in ``compiled``; the file names contain a
digest of the sources. Missing libraries are compiled together, one kernel per CPU at a time, with a
progress bar, or ahead of time by ``vision-backbones build``. They are kept in the user's cache, see
:mod:`ops.cpu.build.folders`, or, if that is not usable, in a private folder below ``/var/tmp`` or
the temporary directory.

Kernels run on the threads of torch's OpenMP runtime (:mod:`ops.cpu.build.openmp`).

Environment variables:

- ``VISION_BACKBONES_NATIVE=0`` (or ``false``, ``no``, ``off``): never compile or load a kernel.
- ``VISION_BACKBONES_NATIVE_ISA=amx|avx512bf16|avx512|avx2|portable``, on ARM
  ``neonbf16|neon|portable``: the newest instruction set to use. With avx512, avx2 or neon,
    inference layers don't use torch's bfloat16 matrix products either.
- ``VISION_BACKBONES_CACHE_DIR``: the cache folder; compiled kernels are kept in its ``native``
  folder.
- ``CXX``: the compiler, tried before ``c++``, ``g++`` and ``clang++``. Without any of these, the
  package ``ziglang`` compiles if it is installed (``ops/cpu/build/zig.py``).
"""

from __future__ import annotations

from ops.cpu.build import (
    LibraryState,
    cache_dir,
    load,
    prepare,
    status,
    unavailable_reason,
)
from ops.cpu.instruction_sets import (
    SettingError,
    instruction_set,
    is_switched_on,
    levels,
)

__all__ = [
    "LibraryState",
    "SettingError",
    "cache_dir",
    "instruction_set",
    "is_switched_on",
    "levels",
    "load",
    "prepare",
    "status",
    "unavailable_reason",
]
