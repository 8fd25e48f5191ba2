"""C++ kernels: compiled already in wheels, else on first use with the system's compiler.

A kernel is one ``.cpp`` file of this folder together with the headers beside it. It has a plain C
interface and includes nothing of torch, so that it compiles in seconds and outlives torch versions.
:func:`load` gives its library, or ``None`` where it cannot be had; the caller then takes its path
in pure torch, and :func:`unavailable_reason` tells people why.

A wheel has a library for each kernel and instruction set in ``compiled``, in files whose names tell
what sources they were made from. What is missing is compiled together, as many kernels at a time as
there are CPUs, with a bar that shows it (:mod:`ops.cpu.batch`), or ahead of time by
``vision-backbones build``. It is kept in a folder of the user's cache, and loaded only from one
that nobody but the user and root may change (:mod:`ops.cpu.trust`), and only if it is intact. Where
the cache will not do (others may write to it, it cannot be written, no code may run there, the disk
is full), libraries lie in a private folder below ``/var/tmp``, ``$XDG_RUNTIME_DIR`` or the folder
for temporary files; a warning says so once (:mod:`ops.cpu.cache`).

Kernels run on the threads of the OpenMP runtime that torch has loaded (:mod:`ops.cpu.openmp`).

Environment variables:

- ``VISION_BACKBONES_NATIVE=0`` (or ``false``, ``no``, ``off``): never compile or load a kernel.
- ``VISION_BACKBONES_NATIVE_ISA=amx|avx512bf16|avx512|avx2|portable``, on ARM
  ``neonbf16|neon|portable``: at most this instruction set. With avx512, avx2 or neon, inference
  layers leave no bfloat16 to torch's products either.
- ``VISION_BACKBONES_CACHE_DIR``: where compiled kernels are kept (a ``native`` folder in it).
- ``CXX``: the compiler, tried before ``c++``, ``g++`` and ``clang++``.
"""

from __future__ import annotations

from ops.cpu.build import (
    Kernel,
    cache_dir,
    load,
    prepare,
    status,
    unavailable_reason,
)
from ops.cpu.instruction_sets import instruction_set, levels
from ops.cpu.settings import SettingError, is_switched_on

__all__ = [
    "Kernel",
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
