"""Helpers for tests of compiled kernels: inputs, layers, activations, other instruction sets."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ops.neighborhood
from ops.cpu import build, instruction_sets, policy
from ops.cpu.build import compiler
from ops.cpu.gemm.linear import packed_linear

# By the names of ops.cpu.activations.ACTIVATIONS.
PLAIN_ACTIVATIONS = {
    "none": lambda x: x,
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "hardswish": F.hardswish,
    "relu6": F.relu6,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "hardsigmoid": F.hardsigmoid,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "squared_relu": lambda x: F.relu(x).square(),
}


def steepness(activation: str, largest: Tensor) -> Tensor:
    """How many times an activation may multiply errors of inputs up to ``largest``."""
    return 1 + 2 * largest if activation == "squared_relu" else torch.ones_like(largest)


def random(*shape: int, seed: int = 0) -> Tensor:
    """Normally distributed, float64."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# bfloat16 has 8 significant bits; sums are float32 for both dtypes.
LINEAR_DTYPES = {torch.float32: 1e-6, torch.bfloat16: 2**-8}
if packed_linear.unavailable(torch.device("cpu"), torch.bfloat16) is not None:
    del LINEAR_DTYPES[torch.bfloat16]


def can_run(instructions: str) -> bool:
    """Whether this CPU supports the instruction set and the environment allows it."""
    return instructions in instruction_sets.candidates()


def conv_layer(
    in_channels: int, out_channels: int, dtype: torch.dtype = torch.float32, **geometry
) -> nn.Conv2d:
    """A convolution with the same random weight in every call."""
    torch.manual_seed(0)
    conv = nn.Conv2d(in_channels, out_channels, **geometry).to(dtype)
    return conv.requires_grad_(False)


@contextmanager
def using_threads(count: int) -> Iterator[None]:
    """Set the number of threads of torch and the kernels within the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def forget_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Discard loaded kernels until the end of the test, so that they are looked up again."""
    monkeypatch.setattr(build.process, "states", {})
    monkeypatch.setattr(ops.neighborhood.functional, "_known_calls", {})


def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulate a machine that cannot compile kernels."""
    monkeypatch.setenv("VISION_BACKBONES_NATIVE", "0")
    forget_kernels(monkeypatch)


def compiled_for(instructions: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulate a machine with this instruction set."""
    if instructions != instruction_sets.instruction_set():  # otherwise already compiled
        _compile_anew(instructions, monkeypatch)


def _compile_anew(instructions: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile kernels again, with few optimisations, which takes a third of the time."""
    monkeypatch.setenv("VISION_BACKBONES_NATIVE_ISA", instructions)
    monkeypatch.setenv("CXX", _compiler("-Og"))
    monkeypatch.setattr(instruction_sets, "COMMON_FLAGS", ["-std=c++17", "-Og", "-fPIC", "-shared"])
    monkeypatch.setattr(build.process, "compiled_with", lambda name: [name])
    monkeypatch.setattr(policy, "_PRODUCTS", frozenset())  # keep portable ones from torch
    forget_kernels(monkeypatch)


def _compiler(*options: str) -> str:
    """A value of ``CXX``."""
    return shlex.join([*compiler.find_compilers([])[0], *options])


def emulate_tiles(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """Simulate a machine with AMX, whose instructions are emulated on AVX512-BF16."""
    _compile_anew("avx512bf16", monkeypatch)
    header = Path(__file__).with_name("emulated_tiles.h")
    monkeypatch.setenv("CXX", _compiler("-Og", "-include", str(header)))
    monkeypatch.setenv("VISION_BACKBONES_CACHE_DIR", str(cache))
    monkeypatch.setattr(instruction_sets, "_richest", lambda: "amx")


def conv_row(*channels: int, bias: bool = True) -> list[nn.Conv2d]:
    """3×3 convolutions with stride 2 and padding 1, from each channel count to the next."""
    torch.manual_seed(0)
    return [
        nn.Conv2d(before, after, 3, 2, 1, bias=bias)
        for before, after in zip(channels, channels[1:], strict=False)
    ]
