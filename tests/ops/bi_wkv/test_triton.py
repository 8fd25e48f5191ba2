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


def test_kernels() -> None:
    outer = ("PYTEST", "TRITON_INTERPRET")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(outer)}
    if not torch.cuda.is_available():
        environment["TRITON_INTERPRET"] = "1"
    options = ("-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-x")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", str(CASES), *options],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


def test_says_why_it_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    tokens = [torch.zeros(1, 3, 2), torch.zeros(1, 3, 2), torch.zeros(2), torch.zeros(2)]
    with pytest.raises(NotImplementedError, match="need a CUDA device, got cpu"):
        bi_wkv(*tokens, backend="triton")
    with pytest.raises(NotImplementedError, match="float32, not torch.float64"):
        bi_wkv(*(t.double() for t in tokens), backend="triton")
