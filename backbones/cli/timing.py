"""Times and memory of calls, by kind of operator too, and the machine they were measured on."""

from __future__ import annotations

import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from ops.cpu.instruction_sets import instruction_set
from ops.inference.heap import return_freed_memory
from ops.replay.workspace import workspace

# The machine's reference: a product of two square matrices of this size, and its FLOPs.
MATMUL_SIZE = 1024
MATMUL_FLOPS = 2 * MATMUL_SIZE**3


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


def ratio(times: Sequence[float], others: Sequence[float]) -> float:
    """Median of the ratios within turns; without turns, the ratio to the other's median."""
    if 1 in (len(times), len(others)):
        return statistics.median(times) / statistics.median(others)
    # Turns that one of the two left out have no ratio.
    return statistics.median(a / b for a, b in zip(times, others, strict=False))


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


PRODUCTS, DEPTHWISE, CONVOLUTIONS = "matrix products", "depthwise conv", "other conv"
ATTENTION, NORMS, ELEMENTWISE = "attention", "norms", "elementwise"
MOVES, OTHERS, PYTHON = "moving data", "other operators", "outside operators"
KINDS = (*(PRODUCTS, DEPTHWISE, CONVOLUTIONS, ATTENTION, NORMS, ELEMENTWISE, MOVES, OTHERS), PYTHON)

# The first pattern that matches an operator's name (without library) decides; convolutions are
# classified by the shape of their weight. Operators that only call others are expanded.
_PATTERNS = {
    ATTENTION: r"scaled_dot_product|attention|na_cpu|natten|neighborhood",
    PRODUCTS: r"(depthwise|packed|response)_mlp|kan_layer|linear$|_linear_pointwise|matmul$|addmm"
    r"|mm$|einsum",
    DEPTHWISE: r"depthwise",
    CONVOLUTIONS: r"_stem$",
    NORMS: r"(layer|batch|group|instance|vector|response)_norm|norm$",
    ELEMENTWISE: r"(add|sub|mul|div|neg|exp|log|sqrt|rsqrt|pow|abs|clamp|square|addcmul|lerp)_?$"
    r"|gelu|relu|silu|sigmoid|hardswish|hardsigmoid|tanh|elu|softmax|where|masked_fill|bitwise"
    r"|(sum|mean|amax|amin|max|min|topk|sort|argmax|var|std)$|pool|dropout|(ge|gt|le|lt|eq|ne)$",
    MOVES: r"copy_|clone|contiguous|cat$|stack$|gather|index|take|roll|pad|reorder|^to$|_to_copy"
    r"|reshape|unfold|im2col|col2im|repeat|flip|pixel_(un)?shuffle|interpolate|upsample|embedding"
    r"|fill_|zeros|ones|arange|scatter|grid_sampl|deform",
}
_CONVOLUTION = re.compile(r"conv(olution|\dd|_transpose)|_convolution_pointwise")


def kind_of(name: str, shapes: list[Any]) -> str | None:
    """The kind of an operator; None if no pattern matches its name."""
    short = name.split("::")[-1]
    if _CONVOLUTION.search(short) and "depthwise" not in short:
        weight = shapes[1] if len(shapes) > 1 else []
        if len(weight) < 3:
            return CONVOLUTIONS
        if weight[1] == 1 and weight[0] > 1 and shapes[0][1] > 1:
            return DEPTHWISE
        return PRODUCTS if all(side == 1 for side in weight[2:]) else CONVOLUTIONS
    return next((kind for kind, pattern in _PATTERNS.items() if re.search(pattern, short)), None)


def time_by_kind(run: Callable[[], object]) -> dict[str, float]:
    """Shares of the time of a call, in the order of KINDS; they add up to 1.

    A 1×1 convolution or a whole feed-forward counts as a matrix product. ``outside operators`` is
    the time between them: Python and the profiler itself, so it is an upper bound.
    """
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        run()
    roots = [event for event in profiler.events() if event.cpu_parent is None]
    spent = dict.fromkeys(KINDS, 0.0)

    def visit(event: Any) -> None:
        kind = kind_of(event.name, event.input_shapes)
        if kind is not None:
            spent[kind] += event.cpu_time_total
            return
        spent[OTHERS] += event.self_cpu_time_total
        for child in event.cpu_children:
            visit(child)

    for event in roots:
        visit(event)
    begun = min(event.time_range.start for event in roots)
    total = max(event.time_range.end for event in roots) - begun
    spent[PYTHON] = max(0.0, total - sum(spent.values()))
    whole = sum(spent.values())
    return {kind: share / whole for kind, share in spent.items()}
