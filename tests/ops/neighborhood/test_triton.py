"""The Triton backend of neighborhood attention, interpreted or on a GPU, and compiled for GPUs."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from triton_runs import run_cases

from ops import triton_devices
from ops.neighborhood import triton
from ops.neighborhood._geometry import Inputs, NAParams

CASES = Path(__file__).with_name("triton_cases.py")
# The slow cases are shared by as many processes, so that they can run beside each other.
PARTS = 12


def test_kernels(tmp_path):
    run_cases(CASES, tmp_path, "-m", "not slow")


@pytest.mark.slow
@pytest.mark.parametrize("part", [f"{i}/{PARTS}" for i in range(PARTS)])
def test_kernels_in_many_cases(part, tmp_path):
    run_cases(CASES, tmp_path, "-m", "slow", TRITON_CASES_PART=part)


def call(**changes) -> str | None:
    """What `unavailable` says about a small call, changed as told."""
    query = torch.zeros(1, 8, 1, changes.pop("dim", 8), **changes)
    params = NAParams((3,), (1,), (1,), (False,), 1.0)
    return triton.unavailable(Inputs(query, query, query), params)


def test_unsupported_says_why(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "need a CUDA device, got cpu" in call()
    assert "need a CUDA device, got meta" in call(device="meta")
    assert "float64" in call(dtype=torch.float64)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert call() is None
    assert "got 257" in call(dim=257)
    assert triton._span(torch.empty(1, 2**16, 2**16, 1, 2, device="meta")) == 2 * (2**32 - 1)
    monkeypatch.setattr(triton, "_span", lambda tensor: 2**31)
    assert "2^31" in call()


def test_says_what_triton_it_needs(monkeypatch):
    monkeypatch.setattr(triton_devices.importlib.metadata, "version", lambda name: "3.3.1")
    monkeypatch.setattr(triton_devices, "_PROBLEM", triton_devices._problem_of_installation())
    assert call() == "triton 3.4 or newer is needed, found 3.3.1"
    monkeypatch.setattr(triton_devices.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(triton_devices, "_PROBLEM", triton_devices._problem_of_installation())
    assert call() == "triton is not installed"


KERNELS = "queries delta grad_key_value scores sums"


# Which imports a module that Python 3.12 and later warn about.
@pytest.mark.filterwarnings("ignore::DeprecationWarning:triton")
@pytest.mark.parametrize(
    ("arch", "dtype", "full"),
    [
        (90, torch.bfloat16, False),
        *(
            pytest.param(arch, dtype, True, marks=pytest.mark.slow)
            for arch in (80, 90)
            for dtype in (torch.float32, torch.float16, torch.bfloat16)
        ),
    ],
)
def test_compiles_ahead_of_time(arch: int, dtype: torch.dtype, full: bool) -> None:
    """A spill of a register or two for each warp's thread is none of a loop's working set."""
    from triton_report import compile_start, starts

    for rank, head_dim in itertools.product((1, 2, 3), (32, 64, 128)) if full else [(2, 64)]:
        rows = [compile_start(start, arch) for start in starts(rank, head_dim, dtype, full=full)]
        assert {row["kernel"] for row in rows} >= {f"{name}_kernel" for name in KERNELS.split()}
        for row in rows:
            assert row["registers"] <= 255, row
            assert row["spilled"] <= (128 if full else 0), row
            assert row["shared"] <= 100 * 1024, row
