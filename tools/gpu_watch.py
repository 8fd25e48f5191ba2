"""A pytest plugin of ``test_gpu.py``: quick cases first, none after a deadline, counts in a file.

The environment gives ``GPU_WATCH_SECONDS`` and ``GPU_WATCH_OUTPUT``.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
import torch

_deadline = time.monotonic() + float(os.environ["GPU_WATCH_SECONDS"])
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
    item.session.shouldstop = "the time is over"
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
    Path(os.environ["GPU_WATCH_OUTPUT"]).write_text(json.dumps(found))
