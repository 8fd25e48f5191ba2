"""Inputs of gated linear attention, and the error of results."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def inputs(
    tokens: int,
    dim: int = 8,
    value_dim: int = 5,
    *,
    back: bool = True,
    bonus: bool = False,
    batch: int = 2,
    heads: int = 3,
    extremes: tuple[float, ...] = (-100.0, 0.0),
    dtype: torch.dtype = torch.float64,
) -> dict[str, Any]:
    """Random tensors; about a third of the log gates are replaced by ``extremes``."""
    generator = torch.Generator().manual_seed(tokens)
    shape = (batch, tokens, heads, dim)
    query, key = torch.randn(2, *shape, dtype=torch.float64, generator=generator)
    value = torch.randn(*shape[:3], value_dim, dtype=torch.float64, generator=generator)
    gates = -2 * torch.rand(2, *shape, dtype=torch.float64, generator=generator)
    for i, extreme in enumerate(extremes):
        gates[torch.rand(gates.shape, generator=generator) < 0.2 / (i + 1)] = extreme
    found = {
        **{"query": query, "key": key, "value": value, "log_gate": gates[0]},
        "log_gate_back": gates[1] if back else None,
        "bonus": torch.randn(heads, dim, dtype=torch.float64, generator=generator)
        if bonus
        else None,
    }
    return {name: t if t is None else t.to(dtype) for name, t in found.items()}


def cast(given: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {name: t if t is None else t.to(dtype) for name, t in given.items()}


def difference(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b).abs().max() / b.abs().max().clamp(min=1e-30)).item()
