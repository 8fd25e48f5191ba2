"""Kernels compiled for AMX, which is emulated: their own tests."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from compiled_kernels import can_run, emulate_tiles

_OPS = Path(__file__).parents[2]
# By the files of their tests. Attention does not multiply by AMX, but where there is some, it does
# not multiply pairs of bfloat16 either.
_KERNELS = {
    "cpu/gemm/test_linear.py": "gemm",
    "cpu/attention/test_cascaded.py": "cascaded_attention",
    "cpu/test_convolutions.py": "gemm",
    "cpu/deformable/test_deformable_conv.py": "deformable",
    "cpu/feed_forward/test_depthwise_mlp.py": "depthwise_mlp",
    "cpu/attention/test_grouped.py": "attention",
    "cpu/feed_forward/test_kan.py": "kan",
    "cpu/feed_forward/test_response_mlp.py": "response_mlp",
    "neighborhood/test_cpu.py": "neighborhood",
    "neighborhood/test_exact.py": "neighborhood",
}
_RUN = """
import sys, pytest
from ops import cpu
cpu.instruction_sets._richest = lambda: "amx"
kernel, *arguments = sys.argv[1:]
assert cpu.load(kernel).has_emulated_tiles()
sys.exit(pytest.main(arguments))
"""


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kernels")


@pytest.mark.slow
@pytest.mark.skipif(not can_run("avx512bf16"), reason="tiles are emulated with AVX512-BF16")
@pytest.mark.parametrize("tests", list(_KERNELS))
def test_kernels(tests: str, kernels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    emulate_tiles(monkeypatch, kernels)
    options = ["-q", "-p", "no:cacheprovider", "-k", "not instruction_sets"]
    done = subprocess.run(
        [sys.executable, "-c", _RUN, _KERNELS[tests], *options, str(_OPS / tests)],
        cwd=_OPS.parents[1],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
