"""The Triton backend of gated linear attention, interpreted or on a GPU, and compiled for GPUs.

Triton decides on its first import whether it interprets, so its tests run in their own processes.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ops.linear_attention import gated_linear_attention, triton

ROOT = Path(__file__).parents[3]
CASES = Path(__file__).with_name("triton_cases.py")

COMPILE = """
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from ops.linear_attention.triton import kernels

SIZES = dict(DIM=32, VALUE_DIM=64, PADDED_DIM=32, BLOCK=64, CHUNK=16, APART=False)
for kernel in (kernels.forward_kernel, kernels.backward_kernel):
    for for_backward in (False, True):
        constants = dict(SIZES, FOR_BACKWARD=for_backward)
        constants = {n: v for n, v in constants.items() if n in kernel.arg_names}
        signature = {}
        for name in kernel.arg_names:
            if name.endswith("strides"):
                signature[name] = ("i32",) * 4
            elif name in constants:
                signature[name] = "constexpr"
            else:
                signature[name] = "*fp32" if name.endswith("ptr") else "i32"
        signature["scale"] = "fp32"
        source = ASTSource(kernel, signature, constants)
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
        assert compiled.asm["ptx"]
print("compiled")
"""


def run(*command: str, interpret: bool) -> subprocess.CompletedProcess[str]:
    # What an outer pytest leaves in the environment is not meant for an inner one.
    outer = ("PYTEST", "TRITON_INTERPRET")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(outer)}
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    return subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def run_cases(*chosen: str) -> None:
    options = ("-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-x", *chosen)
    done = run("-m", "pytest", str(CASES), *options, interpret=not torch.cuda.is_available())
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


def test_kernels():
    run_cases("-k", "gradients and False-False")


@pytest.mark.slow
def test_kernels_in_all_cases():
    run_cases()


@pytest.mark.slow
def test_compiles_ahead_of_time(tmp_path):
    script = tmp_path / "compile_kernels.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{COMPILE}")
    done = run(str(script), interpret=False)
    assert done.stdout == "compiled\n", done.stderr[-4000:]


def test_unsupported_says_why(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    query = torch.zeros(1, 8, 1, 8)
    assert "need a CUDA device, got cpu" in triton.supports(query, query, query)
    assert "float64" in triton.supports(*[query.double()] * 3)
    wide = torch.zeros(1, 1, 1, 257)
    assert "got 257" in triton.supports(wide, wide, wide)
    with pytest.raises(NotImplementedError, match="'triton' cannot.*CUDA"):
        gated_linear_attention(query, query, query, query, backend="triton")
