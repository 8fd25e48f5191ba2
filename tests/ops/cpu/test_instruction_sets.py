"""Which instruction sets CPUs have, and the richest."""

from __future__ import annotations

import ctypes
import platform
from types import SimpleNamespace

import pytest
import torch

from ops.cpu import instruction_sets


@pytest.fixture
def arm(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """This machine is one, and its CPU is looked at anew."""
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    monkeypatch.setattr(instruction_sets, "_richest", instruction_sets._richest.__wrapped__)
    monkeypatch.delenv("VISION_BACKBONES_NATIVE_ISA", raising=False)
    return monkeypatch


@pytest.mark.parametrize(
    ("capability", "bfloat16", "tiles", "expected"),
    [
        ("AVX512", True, True, "amx"),
        ("AVX512", True, False, "avx512bf16"),
        ("AVX512", False, False, "avx512"),
        ("AVX2", True, True, "avx2"),  # as ATEN_CPU_CAPABILITY wants it
        ("DEFAULT", False, False, "portable"),
    ],
)
def test_of_x86(capability: str, bfloat16: bool, tiles: bool, expected: str, arm) -> None:
    arm.setattr(platform, "machine", lambda: "AMD64")
    arm.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    arm.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bfloat16)
    arm.setattr(torch.cpu, "_is_amx_tile_supported", lambda: tiles)
    assert instruction_sets.instruction_set() == expected


def _linux(bits: int) -> SimpleNamespace:
    """What its C library says of the CPU."""
    kind = instruction_sets.AT_HWCAP2

    def getauxval(asked: int) -> int:
        return bits if asked == kind else 0

    return SimpleNamespace(getauxval=getauxval)


def _sysctlbyname(name: bytes, has, size, new, new_size) -> int:
    known = name == b"hw.optional.arm.FEAT_BF16"
    has._obj.value = known
    return 0 if known else -1


@pytest.mark.parametrize(
    ("system", "library", "expected"),
    [
        ("linux", _linux(1 << 14 | 1), "neonbf16"),
        ("linux", _linux(~(1 << 14)), "neon"),
        ("linux", SimpleNamespace(), "neon"),
        ("darwin", SimpleNamespace(sysctlbyname=_sysctlbyname), "neonbf16"),
        ("win32", None, "neon"),
    ],
)
def test_of_arm(system: str, library: object, expected: str, arm: pytest.MonkeyPatch) -> None:
    arm.setattr("sys.platform", system)
    arm.setattr(ctypes, "CDLL", lambda _: library)
    assert instruction_sets.instruction_set() == expected
    arm.setenv("VISION_BACKBONES_NATIVE_ISA", "neon")
    assert instruction_sets.candidates() == ["neon", "portable"]
    arm.setenv("VISION_BACKBONES_NATIVE_ISA", "avx2")
    with pytest.raises(ValueError, match=r"one of \['neonbf16', 'neon', 'portable'\], got 'avx2'"):
        instruction_sets.instruction_set()


def test_of_other_machines(arm: pytest.MonkeyPatch) -> None:
    arm.setattr(platform, "machine", lambda: "riscv64")
    assert instruction_sets.candidates() == ["portable"]
    assert instruction_sets.levels("x86_64")[-2:] == ["avx2", "portable"]
