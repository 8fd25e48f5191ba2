"""Test and benchmark every Triton kernel on this machine's GPU, in under ten minutes.

    make test-gpu

Runs the cases of all Triton kernels (``tests/ops/**/*triton_cases.py``: outputs and gradients
against float64), the quick ones first, with fixed tiles; then compares neighborhood attention,
autotuned, with NATTEN if it is installed, flex attention and SDPA. Writes a JSON file. What there
is no time for is counted or listed there as not run. The exit status is 1 if a case fails.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmark_ops import Effort, describe, measure
from contenders import SETTINGS

from backbones.cli.reports import write_report
from backbones.cli.timing import machine
from backbones.common.arguments import nonempty_path

ROOT = Path(__file__).parents[1]
CONTENDERS = ("triton", "split", "tiled", "sdpa-mask", "flex", "natten", "natten-split")
# The most telling rows first: the last may find no time.
ROWS = (
    ("56x56-k7-d32", "bfloat16", True),
    ("56x56-k7-d32", "bfloat16", False),
    ("128x128-k13-d32", "bfloat16", True),
    ("56x56-k7-d64", "float32", True),
    ("4096-k63-d32", "bfloat16", True),
    ("8x28x28-k3x7x7-d32", "bfloat16", True),
)
BATCH = 8
# What a case may take, compilation included.
SECONDS_OF_A_CASE = 60
# A row may have to compile for some contenders before its time is measured.
SECONDS_OF_A_ROW = 60


# -- what runs within pytest: quick cases first, none after a deadline, counts in a file ----------

_SECONDS, _OUTPUT = "TEST_GPU_SECONDS", "TEST_GPU_OUTPUT"
_deadline = time.monotonic() + float(os.environ.get(_SECONDS, "inf"))
_counts = {"collected": 0, "passed": 0}
_failed: list[str] = []


def pytest_sessionstart() -> None:
    # Tiles are fixed where algorithms must be deterministic; autotuning would take hours.
    torch.use_deterministic_algorithms(True, warn_only=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)
    _counts["collected"] = len(items)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> bool | None:
    if time.monotonic() < _deadline:
        return None
    item.session.shouldstop = "out of time"
    return True  # instead of running it


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed:
        _failed.append(report.nodeid)
    elif report.when == "call":
        _counts["passed"] += 1


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.failed:
        _failed.append(report.nodeid)


def pytest_unconfigure() -> None:
    left = max(0, _counts["collected"] - _counts["passed"] - len(_failed))
    found = {"passed": _counts["passed"], "failed": _failed, "not_run": left}
    Path(os.environ[_OUTPUT]).write_text(json.dumps(found))


# -- what starts pytest ----------------------------------------------------------------------------


def run_cases(file: Path, seconds: float) -> dict[str, Any]:
    """Run the cases of a file for ``seconds``, in a process of its own.

    A case that is running then is finished, unless it takes ``SECONDS_OF_A_CASE`` longer.
    """
    options = ["-q", "-c", "pyproject.toml", "-p", "no:cacheprovider", "-p", "pytest_timeout"]
    options += ["-m", "slow or not slow", "-W", "ignore:.*deterministic:UserWarning"]
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "cases.json"
        environment = {
            **{name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tools")]),
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
            # What cuBLAS wants before it computes deterministically.
            "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
            _SECONDS: str(seconds),
            _OUTPUT: str(output),
        }
        try:
            subprocess.run(
                [sys.executable, "-m", "pytest", str(file), "-p", "test_gpu", *options],
                cwd=ROOT,
                env=environment,
                check=False,
                timeout=max(seconds, 0) + SECONDS_OF_A_CASE,
            )
        except subprocess.TimeoutExpired:
            found = {"passed": 0, "failed": ["a case that did not end"], "not_run": 0}
        else:
            found = json.loads(output.read_text())
    return found | {"seconds": time.monotonic() - started}


def benchmark(deadline: float, device: torch.device) -> Iterator[dict[str, Any]]:
    """The rows that there is time for, those of ``benchmark.py --op neighborhood``."""
    settings = {setting.name: setting for setting in SETTINGS}
    for name, dtype, backward in ROWS:
        if time.monotonic() + SECONDS_OF_A_ROW > deadline:
            return
        kind = getattr(torch, dtype)
        effort = Effort(rounds=5)
        yield measure(settings[name], BATCH, kind, backward, CONTENDERS, device, effort, {})


def verdict(report: dict[str, Any]) -> str:
    """The last line."""
    if report["machine"] is None:
        return "No GPU that torch can use: nothing was tested."
    cases = report["cases"].values()
    passed = sum(of["passed"] for of in cases)
    failed = sum(len(of["failed"]) for of in cases)
    left = sum(of["not_run"] for of in cases)
    rows = f"{len(report['benchmark'])} of {len(ROWS)} benchmark rows"
    name = report["machine"]["name"]
    return f"{name}: {passed} cases passed, {failed} failed, {left} not run; {rows}."


def main(arguments: Sequence[str] | None = None) -> int:
    """Run everything; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=9.5, help="in all, default 9.5")
    parser.add_argument("--output", type=nonempty_path, default=Path("runs/test_gpu.json"))
    args = parser.parse_args(arguments)
    report: dict[str, Any] = {"machine": None, "cases": {}, "benchmark": []}

    def save() -> None:
        write_report(args.output, report)

    if torch.cuda.is_available():
        test(report, 60 * args.minutes, save)
    save()
    sys.stdout.write(f"wrote {args.output}\n{verdict(report)}\n")
    return int(any(of["failed"] for of in report["cases"].values()))


def test(report: dict[str, Any], seconds: float, save: Any) -> None:
    """Fill in the report; calls ``save`` after each part."""
    start = time.monotonic()
    device = torch.device("cuda")
    report["machine"] = machine(device)
    files = sorted((ROOT / "tests" / "ops").rglob("*triton_cases.py"))
    for i, file in enumerate(files):
        # Two thirds of the time, divided among the files that are left.
        left = start + seconds * 2 / 3 - time.monotonic()
        found = run_cases(file, left / (len(files) - i))
        report["cases"][str(file.relative_to(ROOT))] = found
        save()
    for row in benchmark(start + seconds, device):
        report["benchmark"].append(row)
        save()
        for name, result in row["contenders"].items():
            sys.stdout.write(f"{row['setting']} {name:12s} {describe(result)}\n")


if __name__ == "__main__":
    raise SystemExit(main())
