"""Whether this CPU is faster in bfloat16 than in float32.

:func:`ops.cpu.policy.bfloat16_pays` knows for most CPUs. On the others, layers are timed once per
machine, and the figure is kept in the folder of compiled kernels.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import math
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ops.cpu import policy
from ops.cpu.build import folders, process
from ops.cpu.build.sources import GEMM
from ops.cpu.depthwise.conv import depthwise_conv2d, taps_first
from ops.cpu.direct.direct_conv import DirectConv2d, direct_conv2d
from ops.cpu.gemm.linear import pack_weight, packed_linear
from ops.cpu.gemm.mlp import packed_mlp
from ops.cpu.instruction_sets import instruction_set
from ops.cpu.winograd.winograd import WinogradConv2d

__all__ = ["faster_dtype", "warn_if_slower"]

_log = logging.getLogger(__name__)

_LONGEST_S = 0.03  # of a timing
_CHANNELS, _SIDE = 128, 14
_CPU = ("vendor_id", "cpu family", "model", "model name", "stepping")  # of /proc/cpuinfo


def faster_dtype() -> torch.dtype:
    """bfloat16 or float32, whichever fused models are faster in on this CPU."""
    pays = policy.bfloat16_pays(_cpu()[0] == "AuthenticAMD")
    if pays is None:
        pays = _gain(instruction_set()) > 1
    return torch.bfloat16 if pays else torch.float32


def warn_if_slower() -> None:
    """Log a warning, once, if a timing found bfloat16 to be slower."""
    if policy.bfloat16_pays(_cpu()[0] == "AuthenticAMD") is None:
        _warn(instruction_set())


@functools.cache
def _warn(isa: str) -> None:
    if (gain := _gain(isa)) < 1:
        text = "on this CPU (%s), bfloat16 runs at %.2f of the speed of float32: use dtype='auto'"
        _log.warning(text, isa, gain)


@functools.cache
def _cpu() -> tuple[str, ...]:
    """The vendor of this CPU, and what tells its model."""
    with contextlib.suppress(OSError):
        first = Path("/proc/cpuinfo").read_text(errors="replace").partition("\n\n")[0]
        lines = (line.partition(":") for line in first.splitlines())
        found = {name.strip(): value.strip() for name, _, value in lines}
        return tuple(found.get(name, "") for name in _CPU)
    vendor = "AuthenticAMD" if "AuthenticAMD" in platform.processor() else ""  # as on Windows
    return vendor, platform.processor()


@functools.cache
def _gain(isa: str) -> float:
    """How many times as fast as float32 bfloat16 is: the kept figure, or that of a timing."""
    key = repr([_cpu(), process.sources.stem(GEMM, isa), _has_kernels(), torch.__version__])
    name = f"bfloat16-{hashlib.sha256(key.encode()).hexdigest()[:16]}.txt"
    usable = [folder for folder in folders.candidates() if folders.problem(folder) is None]
    for folder in usable:
        with contextlib.suppress(OSError, ValueError):
            if folders.is_own_file(folder / name):
                gain = float((folder / name).read_text())
                if 0 < gain < math.inf:
                    return gain
    gain = _measured()
    for folder in usable:
        with contextlib.suppress(OSError):
            _store(folder, name, f"{gain:.3f}\n")
            break
    return gain


def _store(folder: Path, name: str, text: str) -> None:
    folders.make(folder)
    with folders.scratch(folder) as scratch:
        (scratch / name).write_text(text)
        (scratch / name).chmod(0o600)
        os.replace(scratch / name, folder / name)


def _has_kernels() -> bool:
    cpu = torch.device("cpu")
    return not any(k.unavailable(cpu, torch.bfloat16) for k in (packed_linear, depthwise_conv2d))


@torch.inference_mode()
def _measured() -> float:
    """The ratio of the shortest times in alternation."""
    calls = [_layers(dtype) for dtype in (torch.float32, torch.bfloat16)]
    for call in calls:
        call()  # the first one is slower
    shortest = [math.inf, math.inf]
    end = time.perf_counter() + _LONGEST_S
    while time.perf_counter() < end or math.inf in shortest:
        for i, call in enumerate(calls):
            begin = time.perf_counter()
            call()
            shortest[i] = min(shortest[i], time.perf_counter() - begin)
    return shortest[0] / shortest[1]


def _layers(dtype: torch.dtype) -> Callable[[], object]:
    """A dense convolution, a depthwise one and a feed-forward, as fused models compute them."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=generator) / 8).to(dtype)

    x = random(1, _CHANNELS, _SIDE, _SIDE).contiguous(memory_format=torch.channels_last)
    dense: Any = nn.utils.skip_init(nn.Conv2d, *(_CHANNELS, _CHANNELS, 3), padding=1, dtype=dtype)
    dense.weight.copy_(random(*dense.weight.shape))
    dense.bias.zero_()
    window = random(_CHANNELS, 1, 7, 7)
    first, second = random(4 * _CHANNELS, _CHANNELS), random(_CHANNELS, 4 * _CHANNELS)
    if not _has_kernels():

        def by_torch() -> object:
            maps = F.conv2d(dense(x), window, padding=3, groups=_CHANNELS).permute(0, 2, 3, 1)
            return F.linear(F.gelu(F.linear(maps, first)), second)

        return by_torch
    if dtype == torch.float32:
        dense = WinogradConv2d(dense)
    elif direct_conv2d.unavailable(x.device, dtype) is None:
        dense = DirectConv2d(dense)
    taps, weights = taps_first(window), [pack_weight(first), pack_weight(second)]
    hidden, bias = torch.zeros(4 * _CHANNELS), torch.zeros(_CHANNELS)

    def by_kernels() -> object:
        maps = depthwise_conv2d(dense(x), taps, bias, padding=(3, 3)).permute(0, 2, 3, 1)
        return packed_mlp(maps, weights[0], hidden, weights[1], bias, "gelu")

    return by_kernels
