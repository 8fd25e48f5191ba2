"""The Triton backend of neighborhood attention, interpreted or on a GPU, and compiled for GPUs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fresh_python import run_program
from triton_runs import run_cases

from ops import triton_devices
from ops.neighborhood import na1d, triton
from ops.neighborhood._geometry import NAParams

TESTS = Path(__file__).parents[2]
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
    return triton.unavailable(query, query, query, None, None, None, params)


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


def test_forced_backend_names_the_reason(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    query = torch.zeros(1, 8, 1, 8, dtype=torch.float64)
    with pytest.raises(NotImplementedError, match="'triton' cannot.*float64"):
        na1d(query, query, query, 3, backend="triton")


def report(folder: Path, *options: str) -> list[dict[str, Any]]:
    """The lines that the report writes."""
    said = run_program(str(TESTS / "triton_report.py"), *options, folder=folder)
    return [json.loads(line) for line in said.splitlines() if line.startswith("{")]


def test_compiles_ahead_of_time(tmp_path):
    rows = report(tmp_path, "--arch", "90", "--dtype", "bfloat16", "--head-dim", "64", "--first")
    assert {row["kernel"] for row in rows} == {
        "forward_kernel",
        "delta_kernel",
        "grad_query_kernel",
        "grad_key_value_kernel",
        "scores_kernel",
        "mix_kernel",
        "scatter_kernel",
    }
    for row in rows:
        assert int(row["registers"]) <= 255, row
        assert int(row["spilled"]) == 0, row
        assert int(row["shared"]) <= 100 * 1024, row


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["80", "90"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_every_kernel_compiles_for(arch, dtype, tmp_path):
    options = ("--head-dim", "32", "64", "128", "--rank", "1", "2", "3", "--extra", "--rpb")
    rows = report(tmp_path, "--arch", arch, "--dtype", dtype, *options, "--first")
    assert len(rows) == 3 * 3 * 9
    for row in rows:
        assert int(row["registers"]) <= 255, row
        assert int(row["shared"]) <= 100 * 1024, row
        # A register or two for each warp's thread, not a loop's working set.
        assert int(row["spilled"]) <= 128, row
