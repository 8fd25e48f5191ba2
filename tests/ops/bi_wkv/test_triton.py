"""The Triton kernels of bi-WKV compiled for GPUs."""

from __future__ import annotations

from pathlib import Path

import pytest
from fresh_python import run_code

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
