"""For tests of compiled kernels: inputs, activations as of torch, kernels of other machines."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import ops.neighborhood
from ops.native import build

# By the names of ops.depthwise.ACTIVATIONS.
PLAIN_ACTIVATIONS = {
    "none": lambda x: x,
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "hardswish": F.hardswish,
}


def random(*shape: int, seed: int = 0) -> Tensor:
    """Normally distributed, float64."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def forget_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the end of the test, kernels are looked for anew."""
    monkeypatch.setattr(build, "_kernels", {})
    monkeypatch.setattr(ops.neighborhood, "_known_calls", {})


def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine where nothing can be compiled."""
    monkeypatch.setenv("VISION_BACKBONES_NATIVE", "0")
    forget_kernels(monkeypatch)


def compiled_for(instructions: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine with other instructions; little is optimised, which takes half the time."""
    monkeypatch.setenv("VISION_BACKBONES_NATIVE_ISA", instructions)
    monkeypatch.setenv("CXX", "c++ -O1")
    monkeypatch.setattr(build, "_COMMON_FLAGS", ["-std=c++17", "-O1", "-fPIC", "-shared"])
    forget_kernels(monkeypatch)
