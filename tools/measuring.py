"""Shared code of the benchmarks: timing, peak memory, machine description, incremental reports."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ops.inference.heap import return_freed_memory
from ops.replay.workspace import workspace


class PeakMemory:
    """Peak additional memory during the block in bytes.

    On a GPU, memory allocated by torch; on Linux, the process's resident memory, which covers
    every allocator; elsewhere ``None``.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bytes: int | None = None

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        elif sys.platform == "linux":
            # Release cached memory, which would hide new allocations.
            workspace.clear()
            return_freed_memory()
            Path("/proc/self/clear_refs").write_text("5")
            self.before = self._status("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            self.bytes = torch.cuda.max_memory_allocated() - self.before
        elif sys.platform == "linux":
            self.bytes = max(0, self._status("VmHWM") - self.before)

    @staticmethod
    def _status(field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        (line,) = (line for line in lines if line.startswith(f"{field}:"))
        return 1024 * int(line.split()[1])


def stopwatch(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def steady(run: Callable[[], object], device: torch.device, seconds: float) -> list[float]:
    """Seconds of each call in the second half of ``seconds`` of calls (at least two)."""
    times = [stopwatch(run, device)]
    while len(times) < 2 or sum(times) < seconds:
        times.append(stopwatch(run, device))
    return times[len(times) // 2 :]


def processor_name() -> str:
    """The processor's name, with its number of cores."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        model = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
        name = next(model, name)
    return f"{name}, {os.cpu_count()} cores"


def machine(device: torch.device) -> dict[str, Any]:
    """Description of the machine and software."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else processor_name()
    return {
        "device": device.type,
        "name": name,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def load_report(path: Path, current: dict[str, Any]) -> dict[str, Any]:
    """The report of earlier runs into ``path``, or an empty one.

    Raises:
        ValueError: they ran on another machine or configuration, or it is not a report.
    """
    if not path.exists():
        return {"machine": current, "results": []}
    report = read_report(path)
    if report["machine"] != current:
        raise ValueError(
            f"{path} was measured on {report['machine']}, this is {current}; choose another "
            "--output, or delete it"
        )
    return report


def read_report(path: Path) -> dict[str, Any]:
    """A report that an earlier run wrote.

    Raises:
        ValueError: it is not a report.
    """
    try:
        report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        report["machine"], report["results"]
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is not a benchmark report: {error}") from error
    return report


def replace_results(
    path: Path, report: dict[str, Any], anew: Sequence[dict[str, Any]], keys: Sequence[str]
) -> None:
    """Put results into a report in place of those with the same values of ``keys``; write it."""
    names = {tuple(result[key] for key in keys) for result in anew}
    kept = [r for r in report["results"] if tuple(r[key] for key in keys) not in names]
    report["results"] = kept + anew
    write(path, lambda path: path.write_text(json.dumps(report, indent=1) + "\n"))


def write(path: Path, save: Callable[[Path], object]) -> None:
    """Write a file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{os.getpid()}-{path.name}")
    save(unfinished)
    unfinished.replace(path)
