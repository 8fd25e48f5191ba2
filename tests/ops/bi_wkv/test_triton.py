"""The Triton backend of bi-WKV, interpreted or on a GPU.

Triton decides on its first import whether it interprets, so its tests run in a process of their
own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ops.bi_wkv import bi_wkv

ROOT = Path(__file__).parents[3]
CASES = Path(__file__).with_name("triton_cases.py")


def run(*command: str, interpret: bool) -> None:
    outer = ("PYTEST", "TRITON_INTERPRET")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(outer)}
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


@pytest.mark.parametrize(
    "marks", ["not slow", pytest.param("slow", marks=pytest.mark.slow)], ids=["quick", "slow"]
)
def test_kernels(marks: str) -> None:
    options = ("-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-x", "-m", marks)
    run("-m", "pytest", str(CASES), *options, interpret=not torch.cuda.is_available())


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
def test_compiles_ahead_of_time() -> None:
    run("-c", _COMPILE, interpret=False)


def test_unsupported_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    tokens = [torch.zeros(1, 3, 2), torch.zeros(1, 3, 2), torch.zeros(2), torch.zeros(2)]
    with pytest.raises(NotImplementedError, match="need a CUDA device, got cpu"):
        bi_wkv(*tokens, backend="triton")
    with pytest.raises(NotImplementedError, match="float32, not torch.float64"):
        bi_wkv(*(t.double() for t in tokens), backend="triton")
