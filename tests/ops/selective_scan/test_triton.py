"""The Triton backend of the selective scan, interpreted or on a GPU, compiled for GPUs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fresh_python import run_code
from triton_runs import run_cases

from ops.selective_scan import triton

CASES = Path(__file__).with_name("triton_cases.py")

COMPILE = """
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from ops.selective_scan.triton import kernels

SIZES = dict(STATES=16, PADDED=16, BLOCK=64, CHUNK=16, SOFTPLUS=True)
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
        source = ASTSource(kernel, signature, constants)
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
        assert compiled.asm["ptx"]
print("compiled")
"""


def test_kernels(tmp_path):
    run_cases(CASES, tmp_path, "-k", "gradients and 6-1-2")


@pytest.mark.slow
def test_kernels_in_all_cases(tmp_path):
    run_cases(CASES, tmp_path)


@pytest.mark.slow
def test_compiles_ahead_of_time(tmp_path):
    assert run_code(COMPILE, tmp_path) == "compiled\n"


def test_unsupported_says_why(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    u, rate = torch.zeros(1, 8, 4), torch.zeros(8, 1)
    assert "need a CUDA device, got cpu" in triton.supports(u, rate)
    assert "got torch.float64" in triton.supports(u.double(), rate)
    assert "256 states per channel, got 300" in triton.supports(u, torch.zeros(8, 300))
