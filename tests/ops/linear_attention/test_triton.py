"""The Triton backend of gated linear attention, interpreted or on a GPU, compiled for GPUs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fresh_python import run_code
from triton_runs import run_cases

from ops.linear_attention import gated_linear_attention, triton

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


def test_kernels(tmp_path):
    run_cases(CASES, tmp_path, "-k", "gradients and False-False")


@pytest.mark.slow
def test_kernels_in_all_cases(tmp_path):
    run_cases(CASES, tmp_path)


@pytest.mark.slow
def test_compiles_ahead_of_time(tmp_path):
    assert run_code(COMPILE, tmp_path) == "compiled\n"


def test_unsupported_says_why(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    query = torch.zeros(1, 8, 1, 8)
    assert "need a CUDA device, got cpu" in triton.supports(query, query, query)
    assert "float64" in triton.supports(*[query.double()] * 3)
    wide = torch.zeros(1, 1, 1, 257)
    assert "got 257" in triton.supports(wide, wide, wide)
    with pytest.raises(NotImplementedError, match="'triton' cannot.*CUDA"):
        gated_linear_attention(query, query, query, query, backend="triton")
