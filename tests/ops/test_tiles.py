"""What multiplies by AMX: its kernels' tests on a CPU without, where instructions are emulated."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from compiled_kernels import LINEAR_DTYPES, emulate_tiles

_OPS = Path(__file__).parent
_INFERENCE = ("cascaded_attention", "depthwise_mlp", "deformable", "kan", "response_mlp")
_RUN = """
import sys, pytest, torch
from ops import native
torch.cpu._is_amx_tile_supported = lambda: True
kernel, *arguments = sys.argv[1:]
assert native.load(kernel).has_emulated_tiles()
sys.exit(pytest.main(arguments))
"""


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kernels")


@pytest.mark.slow
@pytest.mark.skipif(torch.bfloat16 not in LINEAR_DTYPES, reason="this CPU multiplies no bfloat16")
@pytest.mark.parametrize(
    ("kernel", "tests"),
    [
        ("linear", "test_linear.py"),
        ("linear", "test_packed_mlp.py"),
        *((kernel, f"inference/test_{kernel}.py") for kernel in _INFERENCE),
    ],
)
def test_kernels_of_bfloat16(
    kernel: str, tests: str, kernels: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    emulate_tiles(monkeypatch, kernels)
    options = ["-q", "-p", "no:cacheprovider", "-k", "not instruction_sets"]
    done = subprocess.run(
        [sys.executable, "-c", _RUN, kernel, *options, str(_OPS / tests)],
        cwd=_OPS.parents[1],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
