"""Kernels for 64-bit ARM: their own tests, cross-compiled and run in qemu."""

from __future__ import annotations

import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from emulators import CPUS, KERNELS, WITH_BYTES, emulate, run_tests

from ops.cpu import instruction_sets
from ops.cpu.build import compiler
from ops.cpu.build.sources import SOURCES, Sources

_emulated = pytest.mark.needs("arm_compiler", "emulator")


@_emulated
@pytest.mark.slow
@pytest.mark.parametrize("instructions", list(CPUS))
@pytest.mark.parametrize("tests", list(KERNELS))
def test_kernels(tests: str, instructions: str, tmp_path: Path) -> None:
    run_tests(tests, instructions, CPUS[instructions], tmp_path)


@_emulated
@pytest.mark.slow
def test_bytes_without_products_of_bfloat16(tmp_path: Path) -> None:
    said = run_tests("cpu/gemm/test_linear.py", "neon", WITH_BYTES, tmp_path)
    assert "skipped" not in said


@_emulated
@pytest.mark.slow
@pytest.mark.parametrize("instructions", list(CPUS))
def test_cpu_detection(instructions: str, tmp_path: Path) -> None:
    emulator = emulate(CPUS[instructions], tmp_path)
    says = emulator.capabilities() & instruction_sets.HWCAP2_BF16
    emulator.close()
    assert bool(says) == (instructions == "neonbf16")


@pytest.mark.slow
@pytest.mark.parametrize("cpu", ["apple_m1", "apple_m2"])  # without and with products of bfloat16
def test_clang_compiles_them_for_macos(cpu: str, tmp_path: Path) -> None:
    zig = [sys.executable, "-m", "ziglang", "c++", "-target", "aarch64-macos", f"-mcpu={cpu}"]
    # As the headers' functions are not all used by all kernels.
    warnings = ["-Wall", "-Wextra", "-Werror", "-Wno-unused-function"]
    flags = [f for f in instruction_sets.COMMON_FLAGS if f not in ("-O3", "-shared")]
    include = f"-I{SOURCES}"
    for name, source in Sources().all().items():
        words = [*zig, *flags, *warnings, include, "-c", str(source), "-o", f"{name}.o"]
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, f"{name}: {done.stderr[-4000:]}"


@pytest.mark.slow
@pytest.mark.timeout(1200)  # zig first compiles its C++ library
def test_a_library_for_macos_is_signed_and_needs_only_the_system(tmp_path: Path) -> None:
    """A processor of Apple's runs no code without a signature, which the linker adds."""
    built = tmp_path / "wkv.so"
    Sources().compile(built, "wkv", "neon", compiler.zig("aarch64-macos.11.0"), ["-s"])
    library = built.read_bytes()
    assert library[:4] == b"\xcf\xfa\xed\xfe"  # 64-bit Mach-O
    (count,), at = struct.unpack_from("<I", library, 16), 32
    commands: dict[int, bytes] = {}
    for _ in range(count):
        kind, size = struct.unpack_from("<2I", library, at)
        commands[kind] = commands.get(kind, b"") + library[at : at + size]
        at += size
    needed, signature, version = commands[0x0C], commands[0x1D], commands[0x32]
    assert re.findall(rb"[\w./]+\.dylib", needed) == [b"/usr/lib/libSystem.B.dylib"]
    assert len(signature) == 16
    assert struct.unpack_from("<I", version, 12) == (11 << 16,)  # as the wheel's tag says
