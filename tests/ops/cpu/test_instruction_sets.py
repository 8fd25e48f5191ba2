"""Which instruction sets ARM has, and the richest; build/test_libraries.py has x86's."""

from __future__ import annotations

import ctypes
import platform

import pytest

from ops.cpu import instruction_sets


@pytest.fixture
def arm(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """This machine is one, and its CPU is looked at anew."""
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    monkeypatch.setattr(instruction_sets, "_richest", instruction_sets._richest.__wrapped__)
    monkeypatch.delenv("VISION_BACKBONES_NATIVE_ISA", raising=False)
    return monkeypatch


class _System:
    """What the C library says of the CPU."""

    def __init__(self, bits: int) -> None:
        def getauxval(kind: int) -> int:
            return bits if kind == instruction_sets.AT_HWCAP2 else 0

        self.getauxval = getauxval


@pytest.mark.parametrize(("bits", "expected"), [(1 << 14 | 1, "neonbf16"), (~(1 << 14), "neon")])
def test_of_arm(bits: int, expected: str, arm: pytest.MonkeyPatch) -> None:
    arm.setattr("sys.platform", "linux")
    arm.setattr(ctypes, "CDLL", lambda _: _System(bits))
    assert instruction_sets.instruction_set() == expected
    arm.setenv("VISION_BACKBONES_NATIVE_ISA", "neon")
    assert instruction_sets.candidates() == ["neon", "portable"]


def test_of_apple(arm: pytest.MonkeyPatch) -> None:
    def sysctlbyname(name: bytes, has, size, new, new_size) -> int:
        known = name == b"hw.optional.arm.FEAT_BF16"
        has._obj.value = known
        return 0 if known else -1

    arm.setattr("sys.platform", "darwin")
    arm.setattr(ctypes, "CDLL", lambda _: type("System", (), {"sysctlbyname": sysctlbyname}))
    assert instruction_sets.instruction_set() == "neonbf16"


def test_of_unknown_systems(arm: pytest.MonkeyPatch) -> None:
    arm.setattr("sys.platform", "linux")
    arm.setattr(ctypes, "CDLL", lambda _: object())
    assert instruction_sets.instruction_set() == "neon"
    arm.setattr("sys.platform", "win32")
    assert instruction_sets.instruction_set() == "neon"


def test_another_architectures_are_refused(arm: pytest.MonkeyPatch) -> None:
    arm.setenv("VISION_BACKBONES_NATIVE_ISA", "avx2")
    with pytest.raises(ValueError, match=r"one of \['neonbf16', 'neon', 'portable'\], got 'avx2'"):
        instruction_sets.instruction_set()


def test_of_other_machines(arm: pytest.MonkeyPatch) -> None:
    arm.setattr(platform, "machine", lambda: "riscv64")
    assert instruction_sets.candidates() == ["portable"]
    assert instruction_sets.levels("x86_64")[-2:] == ["avx2", "portable"]
