"""Kernels for 64-bit ARM: their own tests, cross-compiled and run in qemu."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from emulated_arm import CPUS, WITH_BYTES, Emulator

from ops.cpu import instruction_sets
from ops.cpu.build.sources import SOURCES, Sources

_emulated = pytest.mark.needs("arm_compiler", "emulator")
_OPS = Path(__file__).parents[1]
# By the files of their tests.
_KERNELS = {
    "cpu/attention/test_cascaded.py": "cascaded_attention",
    "cpu/attention/test_gated.py": "attention",
    "cpu/attention/test_grouped.py": "attention",
    "cpu/attention/test_linear.py": "linear_attention",
    "cpu/deformable/test_deformable_conv.py": "deformable",
    "cpu/depthwise/test_conv.py": "depthwise",
    "cpu/feed_forward/test_depthwise_mlp.py": "depthwise_mlp",
    "cpu/feed_forward/test_kan.py": "kan",
    "cpu/feed_forward/test_response_mlp.py": "response_mlp",
    "cpu/gemm/test_convolution.py": "gemm",
    "cpu/gemm/test_int8.py": "gemm",
    "cpu/gemm/test_linear.py": "gemm",
    "cpu/gemm/test_mlp.py": "gemm",
    "cpu/layout/test_nchw.py": "nchw",
    "cpu/norm/test_biased_softmax.py": "norm",
    "cpu/norm/test_layer_norm.py": "norm",
    "cpu/norm/test_response_scales.py": "norm",
    "cpu/norm/test_rms_norm.py": "norm",
    "cpu/pooling/test_window_means.py": "pooling",
    "cpu/resize/test_resize.py": "resize",
    "cpu/scan/test_mixed_scan.py": "gated_scan",
    "cpu/scan/test_normed_scan.py": "gated_scan",
    "cpu/stem/test_packed_stem.py": "stem",
    "cpu/wkv/test_bi_wkv.py": "wkv",
    "cpu/wkv/test_shift.py": "wkv",
    "neighborhood/test_cpu.py": "neighborhood",
    "neighborhood/test_split_cpu.py": "neighborhood",
    "selective_scan/test_backends.py": "selective_scan",
    "replay/test_replay.py::test_pointwise_calls_equal_torchs_bitwise": "replay",
}
# What compiles for other CPUs, or takes minutes in an emulator.
_LEFT_OUT = [
    "instruction_sets",
    "larger_than_the_caches",
    "units_of_work",
    "memory_does_not_grow",
]
_RUN = """
import sys, pytest, emulated_arm
from pathlib import Path
from ops import cpu
instructions, model, scratch, kernel, *arguments = sys.argv[1:]
emulator = emulated_arm.become(instructions, model, Path(scratch))
assert isinstance(cpu.load(kernel), emulated_arm.Emulated), cpu.unavailable_reason(kernel)
assert not emulated_arm.too_new(cpu.status(kernel).path)
failed = pytest.main(arguments)
emulator.close()
sys.exit(failed)
"""


@_emulated
@pytest.mark.slow
@pytest.mark.parametrize("instructions", list(CPUS))
@pytest.mark.parametrize("tests", list(_KERNELS))
def test_kernels(tests: str, instructions: str, tmp_path: Path) -> None:
    _run(tests, instructions, CPUS[instructions], tmp_path)


@_emulated
@pytest.mark.slow
def test_bytes_without_products_of_bfloat16(tmp_path: Path) -> None:
    said = _run("cpu/gemm/test_int8.py", "neon", WITH_BYTES, tmp_path)
    assert "skipped" not in said


def _run(tests: str, instructions: str, model: str, scratch: Path) -> str:
    chosen = " and ".join(f"not {name}" for name in _LEFT_OUT)
    options = ["-q", "-p", "no:cacheprovider", "-o", "timeout=800", "-k", chosen, str(_OPS / tests)]
    done = subprocess.run(
        [sys.executable, "-c", _RUN, instructions, model, str(scratch), _KERNELS[tests], *options],
        cwd=_OPS.parents[1],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [_OPS.parents[1], _OPS.parent]))},
        capture_output=True,
        text=True,
        timeout=840,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return done.stdout


@_emulated
@pytest.mark.slow
@pytest.mark.parametrize("instructions", list(CPUS))
def test_cpu_detection(instructions: str, tmp_path: Path) -> None:
    emulator = Emulator(CPUS[instructions], tmp_path)
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
