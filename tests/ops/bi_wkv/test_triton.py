"""The Triton backend of bi-WKV, interpreted or on a GPU, and compiled for GPUs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fresh_python import run_code
from triton_runs import run_cases

from ops.bi_wkv import bi_wkv

CASES = Path(__file__).with_name("triton_cases.py")


@pytest.mark.parametrize(
    "marks", ["not slow", pytest.param("slow", marks=pytest.mark.slow)], ids=["quick", "slow"]
)
def test_kernels(marks: str, tmp_path: Path) -> None:
    run_cases(CASES, tmp_path, "-m", marks)


_COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from ops.bi_wkv.triton import kernels

for kernel, pointers in ((kernels._forward_kernel, 6), (kernels._backward_kernel, 10)):
    names = kernel.arg_names
    kinds = ["*fp32"] * pointers + ["i32"] * 3 + ["constexpr"] * 2
    for segments in (False, True):
        source = ASTSource(
            kernel,
            dict(zip(names, kinds, strict=True)),
            {"SEGMENTS": segments, "BLOCK": kernels._BLOCK},
        )
        compiled = triton.compile(source, GPUTarget("cuda", 90, 32), {"num_warps": 1})
        assert compiled.asm["cubin"]
"""


@pytest.mark.slow
def test_compiles_ahead_of_time(tmp_path: Path) -> None:
    run_code(_COMPILE, tmp_path)


def test_unsupported_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    tokens = [torch.zeros(1, 3, 2), torch.zeros(1, 3, 2), torch.zeros(2), torch.zeros(2)]
    with pytest.raises(NotImplementedError, match="need a CUDA device, got cpu"):
        bi_wkv(*tokens, backend="triton")
    with pytest.raises(NotImplementedError, match="float32, not torch.float64"):
        bi_wkv(*(t.double() for t in tokens), backend="triton")
