"""Times and memory of calls, and the machine that they were measured on."""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ops.cpu.instruction_sets import instruction_set
from ops.inference.heap import return_freed_memory
from ops.replay.workspace import workspace

# The machine's reference: a product of two square matrices of this size.
MATMUL_SIZE = 1024


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
        "instruction_set": instruction_set(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def matmul(dtype: torch.dtype, device: torch.device | None = None) -> Callable[[], Tensor]:
    """The product of two square matrices of size :data:`MATMUL_SIZE`."""
    matrix = torch.randn(MATMUL_SIZE, MATMUL_SIZE, device=device).to(dtype)
    return lambda: matrix @ matrix


def matmul_flops() -> int:
    """FLOPs of :func:`matmul`."""
    return 2 * MATMUL_SIZE**3
