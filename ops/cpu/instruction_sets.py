"""The instruction sets that kernels are compiled for, and what CPU and environment allow."""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import sys

SWITCH = "VISION_BACKBONES_NATIVE"
_YES, _NO = ("1", "true", "yes", "on"), ("0", "false", "no", "off")

COMMON_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-shared", "-ffp-contract=fast", "-fno-math-errno"]
_AVX512 = [
    *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"),
    *("-mavx2", "-mfma", "-mprfchw", "-mprefer-vector-width=512"),
]
FLAGS = {
    "amx": [*_AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"],
    "avx512bf16": [*_AVX512, "-mavx512bf16"],
    "avx512": _AVX512,
    "avx2": ["-mavx2", "-mfma", "-mprfchw"],
    "neonbf16": ["-march=armv8.2-a+bf16"],
    "neon": [],  # all 64-bit CPUs have it
    "portable": ["-DVB_PORTABLE"],
}
# From the newest to the oldest; a CPU that supports one supports those after it.
_LEVELS = {
    "x86_64": ["amx", "avx512bf16", "avx512", "avx2", "portable"],
    "aarch64": ["neonbf16", "neon", "portable"],
}
_MACHINES = {"amd64": "x86_64", "arm64": "aarch64"}  # what other systems call them


class SettingError(ValueError):
    """An environment variable has an invalid value; the message lists the valid ones."""


def is_switched_on() -> bool:
    """Whether the environment allows kernels to be compiled and loaded.

    Raises:
        SettingError: ``VISION_BACKBONES_NATIVE`` is neither a yes nor a no.
    """
    chosen = os.environ.get(SWITCH, "")
    word = chosen.strip().lower()
    if word not in ("", *_YES, *_NO):
        raise SettingError(f"{SWITCH} must be one of {[*_YES, *_NO]}, got {chosen!r}")
    return word not in _NO


def flags(isa: str) -> list[str]:
    """The compiler flags for the instruction set ``isa``."""
    return [*COMMON_FLAGS, *FLAGS[isa]]


def machine() -> str:
    """The architecture of this machine, under Linux's name."""
    name = platform.machine().lower()
    return _MACHINES.get(name, name)


def system() -> str:
    """The operating system, as in ``sys.platform``."""
    return sys.platform


def levels(architecture: str | None = None) -> list[str]:
    """The instruction sets of an architecture (default: this machine's), newest first."""
    return _LEVELS.get(architecture or machine(), ["portable"])


def instruction_set() -> str:
    """The newest instruction set that this CPU supports and the environment allows.

    Returns:
        ``"amx"`` (with AVX-512 and its instructions for bfloat16), ``"avx512bf16"``, ``"avx512"``
        or ``"avx2"``; on ARM ``"neonbf16"`` or ``"neon"``; or ``"portable"``.

    Raises:
        SettingError: ``VISION_BACKBONES_NATIVE_ISA`` is not an instruction set of this machine.
    """
    known = levels()
    richest = _richest()
    chosen = os.environ.get("VISION_BACKBONES_NATIVE_ISA", "")
    wanted = chosen.strip().lower() or richest
    if wanted not in known:
        raise SettingError(f"VISION_BACKBONES_NATIVE_ISA must be one of {known}, got {chosen!r}")
    return max(richest, wanted, key=known.index)


def is_emulated() -> bool:
    """Whether the environment selects an older instruction set than this CPU's newest."""
    return instruction_set() != _richest()


def candidates() -> list[str]:
    """:func:`instruction_set`, then the plainer ones, all of which run here."""
    known = levels()
    return known[known.index(instruction_set()) :]


@functools.cache
def _richest() -> str:
    if machine() == "aarch64":
        return "neonbf16" if _has_bfloat16_of_arm() else "neon"
    if machine() != "x86_64":
        return "portable"
    import torch  # not at the top: building wheels needs the flags but not torch

    capability = torch.backends.cpu.get_cpu_capability().lower()
    if capability.startswith("avx512"):
        if not torch.cpu._is_avx512_bf16_supported():
            return "avx512"
        return "amx" if torch.cpu._is_amx_tile_supported() else "avx512bf16"
    return "avx2" if capability.startswith("avx2") else "portable"


AT_HWCAP2, HWCAP2_BF16 = 26, 1 << 14  # Linux's


def _has_bfloat16_of_arm() -> bool:
    """Whether the system reports FEAT_BF16; torch 2.7 doesn't tell."""
    if sys.platform == "win32":
        return False
    system = ctypes.CDLL(None)
    if sys.platform == "darwin":
        has, size = ctypes.c_int(0), ctypes.c_size_t(ctypes.sizeof(ctypes.c_int))
        name = b"hw.optional.arm.FEAT_BF16"
        failed = system.sysctlbyname(name, ctypes.byref(has), ctypes.byref(size), None, 0)
        return not failed and bool(has.value)
    if not hasattr(system, "getauxval"):
        return False
    system.getauxval.argtypes, system.getauxval.restype = [ctypes.c_ulong], ctypes.c_ulong
    return bool(system.getauxval(AT_HWCAP2) & HWCAP2_BF16)
