"""The instruction sets that kernels are compiled for, and the richest that this CPU runs."""

from __future__ import annotations

import functools
import os

from ops.cpu.settings import SettingError

__all__ = [
    "COMMON_FLAGS",
    "FLAGS",
    "candidates",
    "flags",
    "instruction_set",
    "is_emulated",
    "levels",
]

COMMON_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-shared", "-ffp-contract=fast", "-fno-math-errno"]
_AVX512 = [
    *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"),
    *("-mavx2", "-mfma", "-mprfchw", "-mprefer-vector-width=512"),
]
# From the richest to the plainest; a CPU that can run one can run those after it.
FLAGS = {
    "amx": [*_AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"],
    "avx512bf16": [*_AVX512, "-mavx512bf16"],
    "avx512": _AVX512,
    "avx2": ["-mavx2", "-mfma", "-mprfchw"],
    "portable": [],
}


def flags(isa: str) -> list[str]:
    """What a compiler is told for the instruction set ``isa``."""
    return [*COMMON_FLAGS, *FLAGS[isa]]


def levels() -> list[str]:
    """The instruction sets of this machine's architecture, the richest first."""
    return list(FLAGS)


def instruction_set() -> str:
    """The richest instruction set that this CPU runs and that the environment allows.

    Returns:
        ``"amx"`` (with AVX-512 and its instructions for bfloat16), ``"avx512bf16"``, ``"avx512"``,
        ``"avx2"`` or ``"portable"``.

    Raises:
        SettingError: if ``VISION_BACKBONES_NATIVE_ISA`` names none of them.
    """
    known = levels()
    richest = _richest()
    chosen = os.environ.get("VISION_BACKBONES_NATIVE_ISA", "")
    wanted = chosen.strip().lower() or richest
    if wanted not in known:
        raise SettingError(f"VISION_BACKBONES_NATIVE_ISA must be one of {known}, got {chosen!r}")
    return max(richest, wanted, key=known.index)


def is_emulated() -> bool:
    """Whether the environment asks for a plainer CPU than this one."""
    return instruction_set() != _richest()


def candidates() -> list[str]:
    """:func:`instruction_set`, then the plainer ones, each of which would run here, too."""
    known = levels()
    return known[known.index(instruction_set()) :]


@functools.cache
def _richest() -> str:
    import torch  # here, as the flags are read where wheels are built, and torch need not be

    capability = torch.backends.cpu.get_cpu_capability().lower()
    if capability.startswith("avx512"):
        if not torch.cpu._is_avx512_bf16_supported():
            return "avx512"
        return "amx" if torch.cpu._is_amx_tile_supported() else "avx512bf16"
    return "avx2" if capability.startswith("avx2") else "portable"
